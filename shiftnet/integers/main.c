/* Classifies images: net [--logits] FILE..., each a binary PPM (P6) of the network's size or raw
   RGB bytes, of which a file can hold any number of images. */
#include "net.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static const char *const names[NET_CLASSES] = {
@NAMES@};

static uint8_t image[NET_IMAGE];
static int32_t logits[NET_CLASSES];

static int fail(const char *path, const char *message)
{
    fflush(stdout);
    fprintf(stderr, "error: %s: %s\n", path, message);
    return 2;
}

/* Reads a number of a PPM's header, and the one character behind it; -1 if there is none. */
static long number(FILE *file)
{
    long value = 0;
    int c = fgetc(file), digits = 0;
    while (c == '#' || c == ' ' || c == '\t' || c == '\n' || c == '\r') {
        if (c == '#')
            while (c != '\n' && c != EOF)
                c = fgetc(file);
        else
            c = fgetc(file);
    }
    for (; c >= '0' && c <= '9' && digits < 9; c = fgetc(file), digits++)
        value = value * 10 + (c - '0');
    if (digits == 0 || (c != ' ' && c != '\t' && c != '\n' && c != '\r'))
        return -1;
    return value;
}

static int classify(const char *path, int show_logits)
{
    long i, best = 0;
    net_run(image, logits);
    for (i = 1; i < NET_CLASSES; i++)
        if (logits[i] > logits[best])
            best = i;
    if (show_logits) {
        for (i = 0; i < NET_CLASSES; i++)
            printf(i ? " %ld" : "%ld", (long)logits[i]);
        printf("\n");
    } else {
        printf("%s: %ld %s\n", path, best, names[best]);
    }
    return ferror(stdout) ? fail("standard output", "cannot be written") : 0;
}

static int classify_all(const char *path, FILE *file, int show_logits)
{
    int c = fgetc(file), d = fgetc(file), code;
    size_t count, start = 0;
    if (c == EOF)
        return fail(path, ferror(file) ? "cannot be read" : "is empty");
    if (c == 'P' && d == '6') {
        long width = number(file), height, most;
        height = width < 0 ? -1 : number(file);
        most = height < 0 ? -1 : number(file);
        if (most != 255)
            return fail(path, "is not a binary PPM with 255 as its largest value");
        if (width != NET_WIDTH || height != NET_HEIGHT) {
            fprintf(stderr, "error: %s: has %ld x %ld pixels, expected %d x %d\n", path, width,
                    height, NET_WIDTH, NET_HEIGHT);
            return 2;
        }
        if (fread(image, 1, NET_IMAGE, file) != NET_IMAGE)
            return fail(path, "ends before its last pixel");
        if (fgetc(file) != EOF)
            return fail(path, "has more bytes than an image of its size");
        return classify(path, show_logits);
    }
    image[start++] = (uint8_t)c;
    if (d != EOF)
        image[start++] = (uint8_t)d;
    while ((count = start + fread(image + start, 1, NET_IMAGE - start, file)) == NET_IMAGE) {
        if ((code = classify(path, show_logits)) != 0)
            return code;
        start = 0;
    }
    if (ferror(file))
        return fail(path, "cannot be read");
    if (count != 0) {
        fflush(stdout);
        fprintf(stderr, "error: %s: ends within an image; a raw image has %d bytes\n", path,
                NET_IMAGE);
        return 2;
    }
    return 0;
}

int main(int argc, char **argv)
{
    int i, code, show_logits = argc > 1 && strcmp(argv[1], "--logits") == 0;
    if (argc < 2 + show_logits) {
        fprintf(stderr, "usage: %s [--logits] FILE...\n", argc ? argv[0] : "net");
        return 2;
    }
    for (i = 1 + show_logits; i < argc; i++) {
        FILE *file = fopen(argv[i], "rb");
        if (file == NULL)
            return fail(argv[i], strerror(errno));
        code = classify_all(argv[i], file, show_logits);
        fclose(file);
        if (code != 0)
            return code;
    }
    return fflush(stdout) ? fail("standard output", "cannot be written") : 0;
}
