"""A worker that dies of SIGALRM 1.2 s after each start. It logs each start in its current directory.

It is a program for supervisord and circus, and an app for peerd.
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
