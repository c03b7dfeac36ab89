// What lies in a store's directory on NVMe, without opening it as a store: for tools. One directory is one path of a store
// (`<local_disk>/vllm-dp0`). All take the directory's lock, so they refuse one that is in use (kLocked, with the owner's pid), and
// an engine that starts meanwhile waits. Any thread; they wait for the device.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lmcn/key.hpp"
#include "lmcn/status.hpp"

namespace lmcn {

struct RegionReport {
  std::uint32_t region = 0;
  std::string state;                 // free | clean | open | sealed | unsealed (its footer is missing, so its headers were walked)
  std::uint64_t sequence = 0;        // order of use; 0: nothing in it
  std::int64_t prepared_unix_s = 0;  // when it was made ready for records; 0: unknown
  std::uint32_t records = 0;         // that can be looked up
  std::uint64_t record_bytes = 0;    // theirs, header pages included
  std::uint64_t dead_bytes = 0;      // of records that were written again elsewhere, or failed
};

struct NamespaceReport {
  NamespaceId ns;
  std::uint64_t records = 0, bytes = 0;
};

struct StoreReport {
  std::string directory, uuid;
  std::uint32_t format = 0;
  std::uint64_t epoch = 0, region_bytes = 0;
  std::uint64_t allocated_bytes = 0;  // by the file system, all files
  std::uint64_t records = 0, record_bytes = 0;
  std::uint64_t from_checkpoint = 0, from_footers = 0, from_walks = 0;  // records, by what told of them
  std::vector<std::uint64_t> hits;  // records that were hit 0, 1, 2, 3, 4..7, 8..15, 16.. times since they were written
  std::uint64_t stored_bytes = 0, reappended_bytes = 0;  // in the directory's life, as of the last checkpoint
  std::uint64_t day_bytes = 0;                           // written within the last 24 hours, all that is written
  std::vector<RegionReport> regions;
  std::vector<NamespaceReport> namespaces;  // when asked for
  std::uint64_t unreadable_headers = 0;     // of those
  std::vector<std::string> notes;

  /// Bytes of records written for each byte stored; 1 when nothing was.
  double write_amplification() const noexcept {
    return stored_bytes == 0 ? 1.0 : static_cast<double>(stored_bytes + reappended_bytes) / static_cast<double>(stored_bytes);
  }
};

/// Writes nothing. `namespaces`: also reads the header page of every record. kNotFound: no store there; kInvalidArgument,
/// kFormatVersion, kCorruption as TieredStore::open.
Result<StoreReport> inspect_store(const std::string& directory, bool namespaces = false);

struct BadRecord {
  ChunkKey key;
  std::uint32_t region = 0, page = 0, pages = 0;
  std::string why;
};

struct VerifyReport {
  std::uint64_t records = 0, bytes = 0;  // read
  std::vector<BadRecord> bad;
  bool stopped = false;  // by `progress`
};

/// Reads and checks every record, `depth` at once. Writes nothing. `progress(bytes, of)`: after every few; false stops.
Result<VerifyReport> verify_store(const std::string& directory, const std::function<bool(std::uint64_t, std::uint64_t)>& progress,
                                  unsigned depth = 8);

struct ClearSelection {
  std::optional<std::int64_t>
      prepared_before_unix_s;  // regions made ready for records before then: all they hold was written since
  std::optional<NamespaceId> ns;
};

struct ClearReport {
  std::uint64_t records = 0, bytes = 0;
  std::uint64_t regions = 0;     // given back to the file system
  std::uint64_t unreadable = 0;  // with a namespace: records whose header does not hold, left alone (they can be no hit)
};

/// Without a selection everything goes, durably, and so does the space. With one, the records that it names (all conditions) are
/// gone for good, also when checkpoint and footers are lost later. A crash in between clears less or all of it, never makes a wrong
/// record.
Result<ClearReport> clear_store(const std::string& directory, const ClearSelection& selection = {});

}  // namespace lmcn
