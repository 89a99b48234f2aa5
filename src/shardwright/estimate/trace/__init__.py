"""One step of a model on fake tensors: what every block keeps, needs beside that, computes and sends."""
