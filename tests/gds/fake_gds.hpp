// A plugin on pread and pwrite that fails as it is told.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

#include "copy/gds_plugin.h"

namespace lmcn::load_test {

enum class Fault : std::uint8_t {
  kNone,
  kMake,        // there is no GDS
  kOpen,        // not on this file system
  kRead,        // reads fail, and may still write: see write_late()
  kReadEnded,   // reads fail, and have ended
  kWrongBytes,  // reads succeed and bring other bytes
  kHang,        // reads (of hang_path alone where it is given) wait until fault is another
};

struct FakeGds {
  std::atomic<Fault> fault{Fault::kNone};
  std::atomic<bool> compat{true};
  std::atomic<std::uint64_t> registered_bytes{0};
  std::function<void()> on_call;  // make, open, read and write begin with it; from any thread
  std::function<void()> on_read;  // read begins with it, too
  std::string hang_path;          // set while no read is under way
  std::atomic<int> reads{0}, hanging{0}, open_files{0}, readers{0};
};
/// The one of this process.
FakeGds& fake_gds();
/// What reads that failed by kRead still write: all of the memory that they were given. Returns how many did.
std::size_t write_late();
/// Their memory is theirs no more.
void end_late();
extern const LmcnGdsPlugin kFakeGds;

}  // namespace lmcn::load_test
