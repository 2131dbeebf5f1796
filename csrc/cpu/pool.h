// Work that the pool runs, and how it is handed over.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>

#include "lss.h"

struct lss_ticket {
    virtual ~lss_ticket() = default;

    // Runs one item; items of one ticket run in any order and on any thread. Must not throw.
    virtual void run(int64_t item) { (void)item; }
    // Runs once, after the last item and before the ticket is done: sums up in a fixed order.
    virtual void finish() {}

    // A caller takes items of the work until none is left; the last one to finish an item finishes the work.
    // Returns true when it was this caller that did. `yield` (may be null) stops early.
    bool take_items(const std::atomic<int32_t> *yield);
    void run_inline();

    int64_t num_items = 0;
    int32_t priority = 0;
    lss_pool *pool = nullptr;  // null: run in the submitting thread

    std::atomic<int64_t> next_item{0};
    std::atomic<int64_t> finished_items{0};
    std::atomic<int32_t> references{1};
    std::atomic<bool> done{false};
    std::atomic<int32_t> status{LSS_OK};
    // Guarded by the pool's mutex.
    bool held = false;
    uint64_t order = 0;
};

namespace lss {

// Consumes `work`: runs it now (ticket null, or neither pool), or submits it and stores its ticket.
int32_t submit(lss_pool *pool, std::unique_ptr<lss_ticket> work, const lss_submit *how, lss_ticket **ticket);

}  // namespace lss
