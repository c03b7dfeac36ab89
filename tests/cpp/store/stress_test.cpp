// Many threads, small bounds, restarts: any answer is either a miss or the right bytes.
#include <random>
#include <thread>

#include "store/store_fixture.hpp"

namespace lmcn {
namespace {

class StressTest : public StoreTest {
 protected:
  void churn(unsigned seed, int steps) {
    std::mt19937 random(seed);
    const auto number = [&](int below) { return static_cast<int>(random() % static_cast<unsigned>(below)); };
    for (int step = 0; step < steps; ++step) {
      const int i = number(600);
      switch (number(10)) {
        case 0:
        case 1:
        case 2:
        case 3:
          put(i);
          break;
        case 4: {
          auto lease = store->reserve(ns, keys(i, i + 3), kPayload, false);  // dropped
          break;
        }
        case 5: {
          auto request = store->begin_request(ns, {});
          for (int k = i; k < i + 5; ++k) request->lookup(key(k));
          break;
        }
        case 6:
          if (number(20) == 0) store->clear();
          if (number(5) == 0) store->erase(key(i));
          store->touch(keys(i, i + 4));
          break;
        default: {
          auto lease = store->acquire(ns, keys(i, i + 2), 2s);
          if (lease.ok()) {
            for (std::size_t n = 0; n < lease->slots().size(); ++n) {
              if (!holds(lease->payload(n), i + static_cast<int>(n))) ++wrong;
            }
            ++hits;
          }
        }
      }
    }
  }
  std::atomic<int> wrong{0};
  std::atomic<int> hits{0};
};

TEST_F(StressTest, ThreadsRestartsReclaimAndClears) {
  with_nvme(24 << 20);
  options.host_bytes = 4 << 20;
  open();
  for (unsigned round = 0; round < 3; ++round) {
    {
      std::vector<std::jthread> threads;
      for (unsigned t = 0; t < 3; ++t) threads.emplace_back([this, seed = round * 10 + t] { churn(seed, 400); });
    }
    ASSERT_EQ(wrong, 0);
    flush();
    const StoreStats idle = store->stats();
    EXPECT_EQ(idle.host_pinned_slots, 0u);
    EXPECT_EQ(idle.host_quarantined_slots, 0u);
    EXPECT_EQ(idle.corrupt_records, 0u);
    EXPECT_EQ(idle.requests, 0u);
    EXPECT_EQ(idle.nvme_dirty_bytes, 0u);
    reopen();
    EXPECT_LE(store->stats().nvme_allocated_bytes, options.nvme_bytes);
  }
  EXPECT_GT(hits, 50);
}

}  // namespace
}  // namespace lmcn
