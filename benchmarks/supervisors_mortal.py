"""A worker that dies 1.2 s after each start, by SIGALRM. It writes a start down where it runs.

A program for supervisord and circus, an app for peerd.
"""

import signal

LIFE_S = 1.2

with open("starts", "a") as starts:
    starts.write("started\n")
signal.setitimer(signal.ITIMER_REAL, LIFE_S)

if __name__ == "__main__":
    signal.pause()
else:
    from peerd import App

    app = App()
