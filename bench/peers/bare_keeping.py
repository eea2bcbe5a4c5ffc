"""The bare loop in a process that keeps freed memory, as ours does."""

from bench.peers import bare
from train.engine.memory import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()
    bare.main()
