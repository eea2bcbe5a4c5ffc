"""torchrun for the scripts of train/: python launch/start.py [options of torchrun] train/SCRIPT.py [--FLAG VALUE ...].

torchrun alone dies of SIGUSR1, gives workers 30 seconds to save, calls a run that was stopped and saved a failure, and
starts it again if it may (torch 2.13). This waits until they have saved, and ends as they did: with 0 done, 75 stopped
and saved (run again to go on), 2 bad input, 3 preflight failed, or 1 and a line on who crashed.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path

EXIT_ERROR, EXIT_USAGE, EXIT_PREFLIGHT, EXIT_STOPPED = 1, 2, 3, 75
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
SAVING_SECONDS = 3600  # the cluster's own grace period ends sooner


def main(arguments: list[str]) -> int:
    """Run the workers of this node to their end and return the exit code."""
    signal.signal(signal.SIGUSR1, _leave)  # until torchrun listens; there is nothing to save yet
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_SECONDS))
    # A store of its own for each attempt: in a shared one restarted gloo processes find addresses of dead ones.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    from launch.rendezvous import meet_at_each_start

    failure = None
    with tempfile.TemporaryDirectory(prefix="exit-codes-") as folder:
        # Workers leave their exit code there and end with 0, unless they crash: so torchrun does not start them again.
        os.environ["EXACT_TRAINING_EXIT_CODES"] = folder
        try:
            options = parse_args(["--signals-to-handle", ",".join(SIGNALS), *arguments])
            meet_at_each_start(options)
            run(options)
        except ChildFailedError as error:
            failure = EXIT_ERROR
            for rank, worker in sorted(error.failures.items(), key=lambda item: item[1].timestamp):
                how = f"exit code {worker.exitcode}"
                if worker.exitcode < 0:
                    how = signal.Signals(-worker.exitcode).name
                print(f"rank {rank} on {os.uname().nodename}: {how} (process {worker.pid})", file=sys.stderr)
        except (ValueError, AssertionError) as error:  # of the options: workers are processes of their own
            print(
                f"error: options of the launcher: {str(error) or 'a number is out of range'}; see --help",
                file=sys.stderr,
            )
            return EXIT_USAGE
        except RendezvousError as error:
            failure = EXIT_ERROR
            print(f"error: {error}", file=sys.stderr)
        except SignalException as error:
            failure = 128 + error.sigval
        for name in SIGNALS:  # what is left takes an instant
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        codes = [int(text) for file in Path(folder).iterdir() if (text := file.read_text())]  # killed as it wrote: none
    for code in (EXIT_USAGE, EXIT_PREFLIGHT):  # bad input that one found explains why others failed
        if code in codes:
            return code
    stopped = EXIT_STOPPED in codes and failure != EXIT_ERROR
    return EXIT_STOPPED if stopped else failure or 0


def _leave(number: int, _: object) -> None:
    print(f"{signal.Signals(number).name} before the start: nothing to save", file=sys.stderr)
    sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)  # a thread that still waits for a lost machine would end in SIGABRT
