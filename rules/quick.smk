# What Snakemake spends on itself and these lines save: about a second of a run, 0.7 s where nothing has to run.
# in: nothing
# out: nothing
# config: none
import gc
import sys
import threading

# No parameter of ours is a data frame; to see that, Snakemake would import pandas.
sys.modules["pandas"] = None
# What has been imported by now stays: to look through it for garbage takes time, most of all at the exit.
gc.freeze()


# The timers of the job rate limiter have nobody left to wake, and the exit would wait a second for them.
onsuccess:
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()
