"""Runs DeepSparse in an interpreter of its own: `python deepsparse_worker.py ONNX INPUTS OUT ...`.

Reads the index of an input from each line of its standard input, writes that input's output to the
file OUT and answers with the seconds it took. Needs numpy and deepsparse, nothing of this project.
"""

import sys
import time

import numpy as np
from deepsparse import Engine

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def main() -> None:
    model, inputs_path, output_path, threads, clock = sys.argv[1:]
    inputs = np.load(inputs_path)
    now = CLOCKS[clock]
    engine = Engine(model=model, batch_size=inputs.shape[1], num_cores=int(threads))
    print("ready", flush=True)
    for line in sys.stdin:
        x = [np.ascontiguousarray(inputs[int(line)])]
        start = now()
        (output,) = engine.run(x)
        seconds = now() - start
        np.save(output_path, output)
        print(seconds, flush=True)


if __name__ == "__main__":
    main()
