"""The layout of the shared mapping; _scoreboard.pyx has the theory."""

cimport cython
from libc.stdint cimport int64_t, uint64_t

from peerd.flight cimport Flight

cdef enum:
    HOLDER_BYTES = 512
    # Magic codes whose waiting coroutines have a row, and the bytes of a row's name.
    MAX_WAITING_ROWS = 16
    MAX_WAITING_NAME_BYTES = 32

# In the order of _scoreboard.COUNTER_NAMES.
cdef enum:
    RX_DATAGRAMS
    RX_MESSAGES
    RX_BYTES
    RX_TRUNCATED
    RX_OWN
    DECODE_EMPTY_COUNT
    DECODE_SHORT_COUNT
    DECODE_NEGATIVE_LENGTH_COUNT
    DECODE_LENGTH_PAST_END_COUNT
    DECODE_NOT_ASCII_COUNT
    UNKNOWN_MAGIC
    RX_MAX_WAITING
    HANDLER_ERRORS
    HANDLED
    TX_MESSAGES
    TX_BYTES
    # In the order of transmit.DropReason.
    TX_DROPPED_FULL
    TX_DROPPED_TOO_BIG
    TX_DROPPED_REFUSED
    TX_DROPPED_CONGESTED
    TX_LOOP
    TX_DROPPED_RATE
    TX_GSO_REFUSED
    ICMP_ERRORS
    LINGERS
    TURNS
    COUNTER_COUNT

cdef enum:
    # Bucket i counts values from 2**i to 2**(i+1) - 1; bucket 0 counts 0 as well, the last all that is above.
    BATCH_BUCKETS = 12
    TURN_BUCKETS = 20

# Coroutine handlers that wait: written by the worker.
cdef struct Waiting:
    uint64_t count
    int64_t not_reading_since_ns
    uint64_t rows_used
    char names[MAX_WAITING_ROWS][MAX_WAITING_NAME_BYTES]  # zeros behind the name
    uint64_t counts[MAX_WAITING_ROWS + 1]  # the last is that of all other magic codes

# Each group of fields has one writer and cache lines (64 bytes) of its own.
cdef struct SlotData:
    # The supervisor writes.
    int64_t pid
    int64_t generation
    int64_t state
    int64_t restarts
    int64_t since_ns
    int64_t lost_in_flight
    int64_t lost_unread
    int64_t successor_pid
    int64_t unread_since_ns  # see Slot.watch_queue
    uint64_t unread_reads
    int64_t supervisor_pad[6]
    # The registrar writes.
    int64_t lease_id
    int64_t registered_until_ns
    char holder[HOLDER_BYTES]
    int64_t registrar_pad[6]
    # The worker writes.
    int64_t heartbeat_ns
    int64_t worker_pad[7]
    Waiting waiting
    int64_t waiting_pad[4]
    uint64_t counters[32]
    uint64_t batch_datagrams[BATCH_BUCKETS]
    uint64_t turn_us[TURN_BUCKETS]
    Flight flight
    # A worker, its successor and the supervisor add to this.
    uint64_t log_dropped
    int64_t shared_pad[7]

# The head of the mapping.
cdef struct BoardData:
    # The supervisor writes.
    int64_t slot_count
    int64_t supervisor_pad[7]
    # The registrar writes.
    int64_t registry_state
    int64_t registrar_heartbeat_ns
    int64_t registrar_pad[6]


@cython.final
cdef class Slot:
    cdef SlotData *data
    cdef readonly int index
    cdef object _board  # keeps the mapping alive


@cython.final
cdef class Scoreboard:
    cdef BoardData *_board
    cdef SlotData *_first
    cdef void *_mapping
    cdef size_t _mapping_bytes
    cdef readonly int capacity
    cdef tuple _slots
