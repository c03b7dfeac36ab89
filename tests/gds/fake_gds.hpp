// A plugin on pread and pwrite that fails as it is told.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "copy/gds_plugin.h"

namespace lmcn::load_test {

enum class Fault : std::uint8_t {
  kNone,
  kMake,        // there is no GDS
  kOpen,        // not on this file system
  kRead,        // reads fail
  kWrongBytes,  // reads succeed and bring other bytes
  kHang,        // reads wait until fault is another
};

struct FakeGds {
  std::atomic<Fault> fault{Fault::kNone};
  std::atomic<bool> compat{true};
  std::atomic<std::uint64_t> registered_bytes{0};
  std::function<void()> on_call;  // make, open, read and write begin with it; from any thread
  std::atomic<int> reads{0}, hanging{0}, open_files{0}, readers{0};
};
/// The one of this process.
FakeGds& fake_gds();
extern const LmcnGdsPlugin kFakeGds;

}  // namespace lmcn::load_test
