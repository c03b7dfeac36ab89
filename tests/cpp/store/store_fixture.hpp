// A store in a temporary directory; each case reads as a script of puts, lookups and restarts.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "io/faulty_engine.hpp"
#include "store/request.hpp"
#include "store/store_core.hpp"

namespace lmcn {

using namespace std::chrono_literals;

class StoreTest : public ::testing::Test {
 protected:
  static constexpr std::uint64_t kPayload = 60 * 1024;  // one slot = 64 KiB with its header page

  void SetUp() override {
    std::string pattern = (std::filesystem::temp_directory_path() / "lmcn_store_XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    root = pattern;
    options.host_bytes = 8 << 20;
    options.max_payload_bytes = 1 << 20;
    options.populate_threads = 0;
    ns = make_namespace("test");
  }
  void TearDown() override {
    store.reset();
    std::filesystem::remove_all(root);
  }

  void with_nvme(std::uint64_t bytes = 64 << 20) {
    options.directories = {(root / "nvme").string()};
    options.nvme_bytes = bytes;
    options.region_bytes = 4 << 20;
  }
  void open() {
    store = std::make_unique<StoreCore>(options);
    store->wrap_engine = wrap_engine;
    const Status started = store->start();
    ASSERT_TRUE(started.ok()) << started.to_string();
  }
  /// Orderly restart.
  void reopen() {
    const Status closed = store->close(10s);
    ASSERT_TRUE(closed.ok()) << closed.to_string();
    store.reset();
    open();
  }

  ChunkKey key(int i) const { return KeyDeriver(ns).derive(std::as_bytes(std::span(&i, 1))); }
  std::vector<ChunkKey> keys(int from, int to) const {
    std::vector<ChunkKey> all;
    for (int i = from; i < to; ++i) all.push_back(key(i));
    return all;
  }
  static std::byte pattern(int i, std::size_t at) { return static_cast<std::byte>((i * 131 + static_cast<int>(at) * 7) & 0xFF); }
  static void fill(std::byte* to, std::uint64_t bytes, int i) {
    for (std::size_t at = 0; at < bytes; ++at) to[at] = pattern(i, at);
  }
  static bool holds(std::span<const std::byte> bytes, int i) {
    if (bytes.size() != kPayload) return false;
    for (std::size_t at = 0; at < bytes.size(); ++at) {
      if (bytes[at] != pattern(i, at)) return false;
    }
    return true;
  }

  bool put(int i) {
    auto lease = store->reserve(ns, keys(i, i + 1), kPayload, false);
    if (!lease.ok() || lease->empty()) return false;
    fill(lease->payload(0), kPayload, i);
    lease->mark_filled(0);
    return lease->commit() == 1;
  }
  void put_all(int from, int to) {
    for (int i = from; i < to; ++i) ASSERT_TRUE(put(i)) << i;
  }
  /// "hit", "miss" or "wrong".
  std::string get(int i) {
    auto lease = store->acquire(ns, keys(i, i + 1), 10s);
    if (!lease.ok()) return "miss";
    return holds(lease->payload(0), i) ? "hit" : "wrong";
  }
  bool in_host(int i) const { return store->lookup(keys(i, i + 1)).host == 1; }
  bool on_nvme_only(int i) const { return store->lookup(keys(i, i + 1)).nvme == 1; }
  void flush() {
    const Status flushed = store->flush(20s);
    ASSERT_TRUE(flushed.ok()) << flushed.to_string();
  }
  /// Whether the slot at `offset` is among all that the store can hand out now, to chunks of `bytes` with keys from `first_key` on.
  bool can_be_reused(std::uint64_t offset, int first_key, std::uint64_t bytes) {
    bool found = false;
    std::vector<WriteLease> held;
    for (int i = first_key;; ++i) {
      auto lease = store->reserve(ns, keys(i, i + 1), bytes, false);
      if (!lease.ok()) return found;
      found = found || lease->slots()[0].offset == offset;
      held.push_back(std::move(*lease));
    }
  }
  /// Pushes everything else out of host memory.
  void evict_all(int first_filler) {
    const int slots = static_cast<int>(options.host_bytes / (kPayload + kPageBytes));
    for (int i = 0; i < slots + 8; ++i) put(first_filler + i);
  }
  /// Waits, without a sleep, until `condition`; false: not within a minute.
  template <class Condition>
  static bool becomes(Condition condition) {
    const auto until = Clock::now() + 60s;
    while (!condition()) {
      if (Clock::now() > until) return false;
      std::this_thread::yield();
    }
    return true;
  }
  /// Until no promotion is under way: waits on the store's eventfd, no sleep.
  void wait_for_promotions() {
    std::unique_lock lock(store->mu);
    ASSERT_TRUE(store->promoted_cv.wait_for(lock, 20s, [&] { return store->promotions_in_flight == 0; }));
  }

  std::filesystem::path root;
  StoreOptions options;
  NamespaceId ns;
  std::function<std::unique_ptr<io::IoEngine>(std::unique_ptr<io::IoEngine>)> wrap_engine;
  std::unique_ptr<StoreCore> store;
};

}  // namespace lmcn
