// A CUDA driver without a device, which writes each call that matters into the file FAKE_CUDA_LOG names.
// FAKE_CUDA_REFUSES makes it refuse to register host memory, as some virtual machines do.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef int Result;
static __thread void *current;
static const char kFirst[8];

static void note(const char *what) {
    FILE *const log = fopen(getenv("FAKE_CUDA_LOG"), "a");
    if (!log) abort();
    if (current) {
        fprintf(log, "%s on %d\n", what, (int)((const char *)current - kFirst));
    } else {
        fprintf(log, "%s without a context\n", what);
    }
    fclose(log);
}

Result cuInit(unsigned flags) { return (void)flags, 0; }
Result cuDeviceGetCount(int *count) { return *count = 2, 0; }
Result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
Result cuCtxGetCurrent(void **context) { return *context = current, 0; }
Result cuCtxSetCurrent(void *context) { return current = context, 0; }
Result cuCtxSynchronize(void) { return note("synchronize"), 0; }
Result cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(kFirst + device), 0; }
Result cuMemHostRegister_v2(void *memory, size_t nbytes, unsigned flags) {
    (void)memory, (void)nbytes, (void)flags;
    if (getenv("FAKE_CUDA_REFUSES")) return 801;
    return note("register"), 0;
}
Result cuMemHostUnregister(void *memory) { return (void)memory, note("unregister"), 0; }
Result cuMemcpyDtoHAsync_v2(void *dst, uint64_t src, size_t nbytes, void *stream) {
    return (void)dst, (void)src, (void)nbytes, (void)stream, note("copy to host"), 0;
}
Result cuMemcpyHtoDAsync_v2(uint64_t dst, const void *src, size_t nbytes, void *stream) {
    return (void)dst, (void)src, (void)nbytes, (void)stream, note("copy to device"), 0;
}
Result cuEventRecord(void *event, void *stream) { return (void)event, (void)stream, 0; }
Result cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    return (void)stream, (void)event, (void)flags, 0;
}
Result cuLaunchHostFunc(void *stream, void (*call)(void *), void *data) {
    return (void)stream, call(data), 0;
}
Result cuGetErrorName(Result error, const char **name) { return *name = error == 801 ? "NOT_SUPPORTED" : "OTHER", 0; }
