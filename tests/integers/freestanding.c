/* A whole program without a C library: images from standard input, logits to standard output, as
   bytes. Linux's calls for RISC-V, which qemu-riscv32 understands. */
#include "net.h"

static long call(long number, long a, long b, long c)
{
    register long a0 __asm__("a0") = a;
    register long a1 __asm__("a1") = b;
    register long a2 __asm__("a2") = c;
    register long a7 __asm__("a7") = number;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
    return a0;
}

void *memcpy(void *to, const void *from, unsigned long size)
{
    char *t = to;
    const char *f = from;
    while (size-- != 0)
        *t++ = *f++;
    return to;
}

void *memset(void *to, int value, unsigned long size)
{
    char *t = to;
    while (size-- != 0)
        *t++ = (char)value;
    return to;
}

static uint8_t image[NET_IMAGE];
static int32_t logits[NET_CLASSES];

void _start(void)
{
    for (;;) {
        long have = 0;
        while (have < NET_IMAGE) {
            long more = call(63, 0, (long)(image + have), NET_IMAGE - have);
            if (more <= 0)
                call(93, have != 0, 0, 0);
            have += more;
        }
        net_run(image, logits);
        call(64, 1, (long)logits, sizeof logits);
    }
}
