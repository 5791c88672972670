"""Large buffers that may stay mostly unused: the kernel adds a page when it is first written.

calloc would not do: once a large block was freed, glibc takes such sizes from its heap instead of from the
kernel (mallopt(3), M_MMAP_THRESHOLD), and writes zeros to all of them.
"""

from peerd.linux_udp cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap


cdef inline void *untouched_pages(size_t size) noexcept nogil:
    """Zeros; NULL without memory."""
    cdef void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    return NULL if pages == MAP_FAILED else pages


cdef inline void free_pages(void *pages, size_t size) noexcept nogil:
    if pages != NULL:
        munmap(pages, size)
