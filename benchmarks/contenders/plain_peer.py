"""The peer of supervisord and circus: a plain Python echo that appends its pid to each datagram."""

import os
import socket
import sys

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("127.0.0.1", int(sys.argv[1])))
    pid = b"%d" % os.getpid()
    while True:
        datagram, sender = sock.recvfrom(65536)
        sock.sendto(datagram + pid, sender)
