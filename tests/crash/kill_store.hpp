// The store under test in the kill rounds, and how it is judged after a kill.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "ledger.hpp"
#include "lmcn/store.hpp"

namespace lmcn {
struct StoreCore;
}

namespace lmcn::crash {

inline constexpr std::uint64_t kLimitBytes = 12 << 20;

/// Lengths around the borders of pages and segments; one of them per id.
std::uint64_t payload_bytes_of(std::uint32_t id);

struct KillStoreOptions {
  std::string directory;
  std::string io_engine;
};
/// With a WitnessEngine between log and device.
Result<std::unique_ptr<StoreCore>> open_store(const KillStoreOptions& options, Ledger& ledger);

/// Publishes what the store acknowledges now; fails `ledger` when that is more than was written. REQUIRES: no put, erase or clear
/// by another thread meanwhile.
void take_snapshot(StoreCore& store, Ledger& ledger);

/// What an id may answer, judged by the ledger.
struct Judgement {
  std::uint64_t expected = 0, kept = 0;                // records acknowledged, whose region was not reused since
  std::uint64_t expected_sealed = 0, kept_sealed = 0;  // of those, in regions that had their footer
  std::uint64_t reused = 0;                            // acknowledged, but their region went to newer records before the kill
  std::uint64_t readable = 0;                          // ids that were read whole
  std::uint64_t allocated_bytes = 0;                   // of the directory
  char first_lost[96] = {};                            // which of the expected ones is not readable, for the message
};

/// Reads every id that exists. The first lie fails `ledger`; acknowledged records that are absent show in the result.
Judgement judge(StoreCore& store, Ledger& ledger, const std::string& directory);

/// Reads the leading `ids` that can be had; false, and `ledger` failed, when a byte is wrong or the id was never written.
bool read_and_check(TieredStore& store, Ledger& ledger, std::span<const std::uint32_t> ids, std::uint32_t* readable);

/// The child: opens, judges if told to, and works until it is killed. Never returns.
struct ChildPlan {
  KillStoreOptions store;
  std::uint64_t seed = 0;
  bool judge_first = false;
  std::uint64_t kill_at = 0;  // event after the open (after the judgement, if there is one first), 0: the parent kills
  int ready_fd = -1;          // gets a byte when the judgement is done or there is none
};
[[noreturn]] void run_child(const ChildPlan& plan, Ledger& ledger, Judgement& judgement);

}  // namespace lmcn::crash
