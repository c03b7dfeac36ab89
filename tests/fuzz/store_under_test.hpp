// What the fuzz targets of the NVMe tier share: a small store that the real log wrote, its bytes, and what must hold when the real
// log opens a changed copy of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "io/io_engine.hpp"
#include "nvme/format.hpp"
#include "nvme/region_log.hpp"

namespace lmcn::fuzz {

/// Of a finding. Nothing catches it in a fuzz target: libFuzzer sees the process end.
struct DoesNotHold : std::logic_error {
  using std::logic_error::logic_error;
};
void require(bool holds, const std::string& what);

/// A new directory, in $TMPDIR or in memory. A fuzzer that ends by itself leaves it behind; run.sh removes all it gave TMPDIR for.
std::string make_directory();

ChunkKey key_of(std::uint32_t id);
NamespaceId store_namespace();

/// Does each request in submit(), on the caller's thread: runs are repeatable.
class InlineEngine final : public io::IoEngine {
 public:
  void submit(std::span<const io::IoRequest> requests) override;
  Status register_buffer(std::span<std::byte>) override { return {}; }
  Status register_fd(int) override { return {}; }
  void unregister_fd(int) override {}
  std::string name() const override { return "inline"; }
  /// The next write of more than one page ends with this errno.
  void fail_next_record(int error) { next_error_ = error; }

 private:
  int next_error_ = 0;
};

using Bytes = std::vector<std::byte>;

struct StoreFiles {
  Bytes superblock, checkpoint, data;
  bool has_data = true, has_checkpoint = true;  // else the file is absent
};

/// A store made by the real log. It has two sealed regions, an open one with a skip header in it, and a clean one; its checkpoint
/// is of a moment when region 1 was open.
struct MadeStore {
  nvme::LogOptions options;
  std::uint32_t region_pages = 0;
  nvme::Uuid uuid{};
  StoreFiles files;
  struct Written {
    std::uint32_t id;
    Extent extent;
  };
  std::vector<Written> written;
  std::map<ChunkKey, std::uint32_t> ids;
  std::vector<std::uint64_t> region_sequences;  // by region

  std::uint32_t regions() const { return static_cast<std::uint32_t>(files.data.size() / kPageBytes / region_pages); }
};

/// Regions of 16 pages; of 256 pages with small records, so that footers have two pages.
const MadeStore& small_store();
const MadeStore& large_store();

struct Expect {
  bool refusal_allowed = false;       // open() may refuse, and then leaves all files as they are
  bool only_what_was_written = true;  // no checksum was made to fit: every recovered record was written, where it is said to be
  bool payloads_as_written = true;    // no record was touched: every recovered record that was written there reads as written
  bool goes_on = true;                // append to it, checkpoint it, open it once more
};

struct Outcome {
  Code refusal = Code::kOk;
  std::vector<nvme::RecoveredRecord> recovered;
  std::uint64_t from_checkpoint = 0;
};

/// Puts `files` into a directory, opens it with the real log and looks at all it says: no record lies outside its region, overlaps
/// another or reads wrong bytes, and what `expect` says. Throws DoesNotHold.
Outcome open_and_check(const MadeStore& store, const StoreFiles& files, const Expect& expect);

/// Takes values off the front of an input; zeros beyond its end.
class Input {
 public:
  explicit Input(std::span<const std::uint8_t> bytes) : left_(bytes) {}
  template <class T>
  T take() {
    T value{};
    const std::size_t n = std::min(sizeof value, left_.size());
    if (n != 0) std::memcpy(&value, left_.data(), n);
    left_ = left_.subspan(n);
    return value;
  }
  Bytes take_bytes(std::size_t count);
  Bytes rest() { return take_bytes(left_.size()); }
  bool empty() const { return left_.empty(); }

 private:
  std::span<const std::uint8_t> left_;
};

/// Makes the checksum of the structure in this page right, whichever it is by its magic. A footer's trailer counts only in the
/// page that ends a region; its entries may begin in earlier pages.
void repair_page(std::span<std::byte> data, std::uint32_t region_pages, std::uint32_t page);
void repair_footer(std::span<std::byte> region);
void repair_checkpoint(Bytes& file);
void repair_slot_root(std::byte* header_page);

}  // namespace lmcn::fuzz
