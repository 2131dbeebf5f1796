// Host memory straight from mmap: page aligned, zeroed, placed by whoever touches it first.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "error.h"
#include "pool.h"

namespace {

constexpr size_t kTouchBytes = size_t{4} << 20;  // two huge pages per item

struct Touch : lss_ticket {
    char *memory = nullptr;
    size_t nbytes = 0, page = 4096;
    void run(int64_t item) override {
        const size_t start = static_cast<size_t>(item) * kTouchBytes;
        const size_t end = start + kTouchBytes < nbytes ? start + kTouchBytes : nbytes;
        for (size_t at = start; at < end; at += page) *const_cast<volatile char *>(memory + at) = 0;
    }
};

}  // namespace

extern "C" {

int32_t lss_mem_alloc(size_t nbytes, int32_t huge, int32_t in_forks, lss_pool *pool, void **memory) {
    if (nbytes == 0) return lss::fail(LSS_ERR_ARGUMENT, "cannot map 0 bytes");
    void *const mapped = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) {
        return lss::fail(LSS_ERR_MEMORY, "the system refused %zu bytes of host memory: %s", nbytes,
                         std::strerror(errno));
    }
    if (huge) madvise(mapped, nbytes, MADV_HUGEPAGE);  // advice: a kernel without huge pages is no error
    if (!in_forks && madvise(mapped, nbytes, MADV_DONTFORK) != 0) {
        const int error = errno;
        munmap(mapped, nbytes);
        return lss::fail(LSS_ERR_MEMORY, "madvise(MADV_DONTFORK) of %zu bytes failed: %s", nbytes, std::strerror(error));
    }
    *memory = mapped;
    if (!pool) return LSS_OK;
    auto touch = std::make_unique<Touch>();
    touch->memory = static_cast<char *>(mapped);
    touch->nbytes = nbytes;
    touch->page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    touch->num_items = static_cast<int64_t>((nbytes + kTouchBytes - 1) / kTouchBytes);
    const int32_t status = lss::submit(pool, std::move(touch), nullptr, nullptr);
    if (status != LSS_OK) munmap(mapped, nbytes);
    return status;
}

int32_t lss_mem_free(void *memory, size_t nbytes) {
    if (munmap(memory, nbytes) != 0) return lss::fail(LSS_ERR_ARGUMENT, "munmap failed: %s", std::strerror(errno));
    return LSS_OK;
}

}  // extern "C"
