// Versions, error texts, and the choice of an instruction set.
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "error.h"
#include "kernels.h"
#include "lss.h"

namespace lss {
namespace {

thread_local char error_text[512] = "";

struct Isa {
    const char *name;
    const KernelTable *table;
    bool (*usable)();
};

bool always() { return true; }

#if defined(__x86_64__)
// What the compiler flags of CMakeLists.txt let each table use. __builtin_cpu_supports also checks that the
// operating system saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
const Isa isas[] = {{"avx512", &table_avx512, has_avx512}, {"avx2", &table_avx2, has_avx2},
                    {"generic", &table_generic, always}};
#elif defined(__aarch64__)
const Isa isas[] = {{"neon", &table_neon, always}};
#else
const Isa isas[] = {{"generic", &table_generic, always}};
#endif

std::atomic<const Isa *> active{nullptr};

const char *supported_names() {
    static const char *const names = [] {
        static char text[64];
        for (const Isa &isa : isas) {
            if (!isa.usable()) continue;
            if (text[0]) std::strcat(text, ",");
            std::strcat(text, isa.name);
        }
        return text;
    }();
    return names;
}

int32_t find(const char *name, const char *asked_by, const Isa **found) {
    for (const Isa &isa : isas) {
        if (name && std::strcmp(isa.name, name) != 0) continue;
        if (!isa.usable()) {
            if (!name) continue;
            return fail(LSS_ERR_ISA, "%s asks for instruction set '%s', which this processor lacks; use one of: %s",
                        asked_by, name, supported_names());
        }
        *found = &isa;
        return LSS_OK;
    }
    return fail(LSS_ERR_ISA, "%s asks for unknown instruction set '%s'; use one of: %s", asked_by, name ? name : "",
                supported_names());
}

const Isa *choose() {
    const Isa *isa = active.load(std::memory_order_acquire);
    if (isa) return isa;
    const char *name = std::getenv("LSS_ISA");
    if (name && !*name) name = nullptr;
    if (find(name, "LSS_ISA", &isa) != LSS_OK) return nullptr;
    active.store(isa, std::memory_order_release);
    return isa;
}

}  // namespace

int32_t fail(int32_t status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}

const KernelTable *kernels() {
    const Isa *isa = choose();
    return isa ? isa->table : nullptr;
}

}  // namespace lss

extern "C" {

int32_t lss_abi_version(void) { return LSS_ABI_VERSION; }
size_t lss_sizeof_adamw_hyper(void) { return sizeof(lss_adamw_hyper); }
size_t lss_sizeof_adamw_segment(void) { return sizeof(lss_adamw_segment); }
const char *lss_last_error(void) { return lss::error_text; }

const char *lss_isa_name(void) {
    const lss::Isa *isa = lss::choose();
    return isa ? isa->name : nullptr;
}
const char *lss_isa_supported(void) { return lss::supported_names(); }
int32_t lss_isa_set(const char *name) {
    const lss::Isa *isa = nullptr;
    const int32_t status = lss::find(name ? name : "", "lss_isa_set", &isa);
    if (status == LSS_OK) lss::active.store(isa, std::memory_order_release);
    return status;
}

}  // extern "C"
