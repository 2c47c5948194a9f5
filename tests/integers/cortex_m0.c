/* A whole program for a Cortex-M0 without an operating system or a C library: images.h holds the
   images, and the logits go to the debugger's standard output, as bytes (Arm's semihosting, which
   qemu-system-arm understands). */
#include "images.h"
#include "net.h"

enum { OPEN = 0x01, WRITE = 0x05, EXIT = 0x18, APPLICATION_EXIT = 0x20026 };

extern uint32_t stack_end[], data_start[], data_end[], data_load[], bss_start[], bss_end[];

static int call(int operation, const void *argument)
{
    register int r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
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

static void reset(void)
{
    static int32_t logits[NET_CLASSES];
    uint32_t *to, *from = data_load, i;
    for (to = data_start; to < data_end;)
        *to++ = *from++;
    for (to = bss_start; to < bss_end;)
        *to++ = 0;
    {
        const uintptr_t name[3] = {(uintptr_t) ":tt", 5, 3}; /* standard output, "wb" */
        const int handle = call(OPEN, name);
        for (i = 0; i < sizeof images / NET_IMAGE; i++) {
            uintptr_t written[3];
            net_run(images + i * NET_IMAGE, logits);
            written[0] = (uintptr_t)handle;
            written[1] = (uintptr_t)logits;
            written[2] = sizeof logits;
            call(WRITE, written);
        }
    }
    call(EXIT, (const void *)APPLICATION_EXIT);
    for (;;)
        ;
}

__attribute__((section(".vectors"), used)) static const void *const vectors[2] = {stack_end, (const void *)reset};
