"""Python code of completions, run against tests in processes with limits; Linux alone.

What a process cannot do, and by what, on Linux 6.2 or later, x86-64 and aarch64:

- take more CPU time, memory or time than the limits, write larger files, print more than the bound: it is killed
- see files other than Python's and the system's libraries (``/usr``, ``/lib``), or write outside of its empty folder,
  which is removed afterwards: Landlock
- open sockets, start or signal processes, trace others, raise limits, mount, change modes and owners: seccomp, and a
  network namespace without devices where users may make one
- read variables of the environment, or descriptors of this process: it gets none

What is left: names, sizes and times of files can be asked for; the folder's files are bounded each and not together;
threads are possible; timing, and the CPU's caches, are shared. The kernel is the border: it is no virtual machine.
Tests run in the process of the code, so code that is written against this module can say that it passed; exiting early,
printing or raising does not.
"""

from toolkit.training.sandbox.rewards import code, code_block
from toolkit.training.sandbox.running import Limits, Outcome, run_code, run_many

__all__ = ["Limits", "Outcome", "code", "code_block", "run_code", "run_many"]
