// DeviceLoader: brings records of the NVMe log into an engine's paged memory without a slot of the host arena: file -> staging
// memory on the device -> verified there -> pages. The file is read by GPUDirect Storage (the plugin liblmcn_gds.so on libkvikio)
// or by O_DIRECT through host memory. docs/gds.md says what each needs.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lmcn/key.hpp"
#include "lmcn/kv_layout.hpp"
#include "lmcn/status.hpp"

struct LmcnGdsPlugin;  // C interface of the plugin: cpp/src/copy/gds_plugin.h

namespace lmcn {

/// A record, what it must be, and the pages it goes to.
struct DeviceLoadItem {
  std::string path;                   // of the data file
  std::uint64_t offset = 0;           // of the record in it, bytes; a multiple of 4096
  std::uint64_t image_bytes = 0;      // of the record, header page included
  ChunkKey key = {};                  // a record of another key, namespace or sequence is a miss
  NamespaceId ns = {};                //
  std::uint64_t region_sequence = 0;  // of its region, when the record's place was looked up
  std::uint32_t first_token = 0;      // these four as in CopyItem
  std::uint32_t tokens = 0;
  std::uint32_t block_begin = 0;
  std::uint32_t token_in_block = 0;
};

struct DeviceLoadJob {
  std::uint64_t id = 0;  // caller's, unique among unfinished jobs
  std::vector<DeviceLoadItem> items = {};
  std::vector<std::int64_t> block_ids = {};
  std::uint64_t stream = 0;  // CUDA: the engine's cudaStream_t after which pages may be written (0: legacy default); host: ignored
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
};

struct DeviceLoadFailure {
  std::uint32_t item = 0;
  Status status;
};

struct DeviceLoadDone {
  std::uint64_t id = 0;
  bool ok = false;
  std::uint64_t bytes = 0;                // of pages written
  double seconds = 0;                     // from the start of the first item to the end of the last
  std::vector<DeviceLoadFailure> failed;  // by item; their pages were not touched unless the code is kIoError "scatter: ..."
};

/// What last read a data file without an error.
struct DeviceLoadPath {
  std::string path;
  std::string name;    // "gds" | "gds-compat" (kvikio without GDS) | "host"
  std::string reason;  // how that is known (cuFile's answer for this file), or why it is not "gds"; empty where no plugin was given
};

/// Thread-safe. submit(), poll() and cancel() wait for no I/O and no copy. An item ends in one of these ways:
///  ok                 its record was whole and the right one, and its pages hold it
///  kCorruption        its bytes are not provably the right ones (another key, namespace or region sequence; a checksum)
///  kIoError, kNotFound, kFormatVersion  the file could not be opened or read, is shorter, or is of another format
///  kDeadlineExceeded  it was not verified by the job's deadline; kAborted: it was cancelled, or the loader is going away
/// No byte of a record reaches a page before all its segments were verified in the very memory that is then copied. An item whose
/// copy to pages has begun is waited for, whatever the deadline; when nobody can tell whether it has ended: see lost().
class DeviceLoader {
 public:
  virtual ~DeviceLoader() = default;  // waits for reads under way; what was not started fails
  /// kInvalidArgument (nothing is loaded): block id, token range, offset or image_bytes out of bounds; duplicate id.
  virtual Status submit(DeviceLoadJob job) = 0;
  /// Jobs that ended since the last call; each exactly once.
  virtual std::vector<DeviceLoadDone> poll() = 0;
  /// Waits until none of `ids` is under way. kDeadlineExceeded. kUnavailable: lost().
  virtual Status wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) = 0;
  /// Items not yet verified fail at once with kAborted; a read under way is left to end and its bytes are dropped.
  virtual void cancel(std::span<const std::uint64_t> ids) = 0;
  /// kUnavailable: a device has answered nothing but errors for DeviceLoaderOptions::lost_after, and jobs whose copies to pages it
  /// may still execute will never come through poll(): their pages cannot be given to anyone. No job is accepted any more. kOk: no
  /// such thing happened.
  virtual Status lost() const { return {}; }
  /// Of all paths(), the one that is furthest from GDS: "gds", "gds-compat", "host"; "none" while nothing was read and it is not
  /// known.
  virtual std::string name() const = 0;
  /// Every file that was read, by path.
  virtual std::vector<DeviceLoadPath> paths() const = 0;
  /// It reads through host memory now, though it was made to do better.
  virtual bool gds_given_up() const = 0;
  /// Lines for the log since the last call; one when GDS failed and was given up for the host path.
  virtual std::vector<std::string> notes() = 0;
};

struct DeviceLoaderOptions {
  int device = -1;  // CUDA device of the paged memory; -1: the pages and the staging are host memory
  std::uint32_t rank = 0;
  std::uint32_t rank_count = 1;
  std::uint64_t buffer_bytes = 256ull << 20;  // staging memory, allocated and registered once; bounds the records in flight
  unsigned in_flight = 8;                     // records read at once, at most what buffer_bytes holds; each has a thread
  unsigned files = 1;                     // that items will name; each has at most in_flight / files of the reads, and one at least
  const LmcnGdsPlugin* plugin = nullptr;  // load_gds_plugin(); null: the host path
  bool allow_compat = false;              // whether kvikio without GDS will do (tests, measuring); else kUnavailable
  std::chrono::milliseconds lost_after{30'000};  // as CopierOptions::lost_after
};

/// kInvalidArgument: layout, rank, or buffer_bytes that holds no record. kUnavailable: no CUDA, no GDS and compat not allowed, or
/// reads of earlier loaders of this process have not provably ended; the message says what is missing. kResourceExhausted: no
/// memory for staging. `paged`'s memory outlives the loader. Allocates; may wait for the device. With a plugin one record's part of
/// buffer_bytes is kept for after a read that did not end cleanly, where it holds two.
Result<std::unique_ptr<DeviceLoader>> make_device_loader(const PagedKvLayout& paged, const SlotLayout& slot,
                                                         const DeviceLoaderOptions& options);

/// Opens the plugin at `path`, after `libraries` (absolute paths of what it needs, in order; none where they are loaded already, as
/// after Python's libkvikio.load_library()). Once in a process, never closed; a second call answers what the first did if that was
/// ok. kUnavailable: there is no such file, a library it needs is missing, or it is of another build; the message says which.
Result<const LmcnGdsPlugin*> load_gds_plugin(const std::string& path, std::span<const std::string> libraries = {});

struct GdsProbeOptions {
  std::string directory;                  // of the store; a private scratch file is made there, without a name
  const LmcnGdsPlugin* plugin = nullptr;  // null: only the host path is measured
  int device = -1;                        // as in DeviceLoaderOptions
  std::uint64_t bytes = 256ull << 20;     // of the scratch file; rounded down to pieces of 2 MiB, at least one
  unsigned in_flight = 8;
  bool measure_without_gds = true;  // false: where GDS is not real nothing is written and nothing measured
};

/// Rates in 10^9 bytes per second; 0: not measured. Every byte read was compared with what was written.
struct GdsProbe {
  std::string mode = "none";             // "gds" | "compat" (kvikio or cuFile copies through host memory) | "none"
  std::string reason;                    // why the mode is not "gds"; else how it is known that it is
  double gds_read = 0, gds_write = 0;    // through kvikio, in any mode
  double host_read = 0, host_write = 0;  // O_DIRECT and host memory, with the copy to the device where there is one
  /// With a margin of a tenth: the rates of one pass differ by some percent from run to run, and without it a tie would be settled
  /// by noise, differently for each rank and restart. A tie goes to the host path, which needs no driver that may fail.
  bool use_gds() const noexcept { return mode == "gds" && gds_read > 1.1 * host_read; }
};

/// Writes `bytes` twice and reads them four times; takes as long as that does. kIoError: the directory cannot hold the scratch file
/// or gave back other bytes than were written. That GDS is missing is a result, not an error.
Result<GdsProbe> probe_gds(const GdsProbeOptions& options);

}  // namespace lmcn
