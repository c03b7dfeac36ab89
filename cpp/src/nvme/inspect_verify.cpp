#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "nvme/inspect.hpp"

namespace lmcn::nvme {
namespace {

constexpr std::uint64_t kMemoryBytes = 256ull << 20;
constexpr std::uint64_t kMostThreads = 8;
constexpr std::chrono::milliseconds kProgressInterval{100};

}  // namespace

void StoreFiles::verify_one(const Live& record, std::uint64_t region_sequence, std::byte* image, std::vector<BadRecord>& bad,
                            std::uint64_t& record_sequence, NamespaceId& ns) {
  const auto fail = [&](const char* check, std::string detail) {
    bad.push_back({record.key, record.extent.region, record.extent.page, record.extent.pages, check, std::move(detail)});
  };
  const std::uint64_t bytes = record.extent.pages * kPageBytes;
  io::IoRequest request;
  request.fd = data_.get();
  request.data = image;
  request.bytes = bytes;
  request.offset = record.extent.region * superblock_.region_bytes + record.extent.page * kPageBytes;
  const io::IoResult result = io::run_sync(engine_, request);
  if (const Status status = result.status("read of a record"); !status.ok()) return fail("read", status.message());
  if (const Status status = check_header(image, bytes); !status.ok()) return fail("header", status.message());
  const SlotHeader& header = *slot_header(image);
  ns = header.ns;
  if (header.region_sequence != region_sequence) {
    return fail("region sequence", "the record says " + std::to_string(header.region_sequence) + ", its region has " +
                                       std::to_string(region_sequence));
  }
  if (header.key != record.key) return fail("key", "the record's key is " + header.key.to_hex());
  if (image_bytes(header.payload_bytes) != bytes) {
    return fail("length", "the record takes " + std::to_string(image_bytes(header.payload_bytes)) + " bytes, its extent has " +
                              std::to_string(bytes));
  }
  if (const Status status = verify_slot(image, bytes, record.key, header.ns); !status.ok())
    return fail("payload", status.message());
  record_sequence = header.record_sequence;
}

Result<VerifyReport> StoreFiles::verify(const Progress& progress) {
  StoreReader files = reader();
  Result<Contents> read = read_contents(files);
  if (!read.ok()) return read.status();
  const Contents& contents = *read;
  VerifyReport out;
  out.notes = contents.notes;
  std::uint64_t largest = kPageBytes;
  for (const Live& record : contents.live) {
    const std::uint64_t bytes = record.extent.pages * kPageBytes;
    ++out.total.records;
    out.total.bytes += bytes;
    largest = std::max(largest, bytes);
  }

  std::mutex mutex;  // `out` and `tallies` below
  std::condition_variable changed;
  std::map<NamespaceId, Tally> tallies;
  std::vector<std::uint64_t> sequences(contents.live.size());  // 0: not verified
  std::atomic<std::size_t> next{0};
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> done_records{0}, done_bytes{0};
  std::size_t running = std::clamp<std::uint64_t>(kMemoryBytes / largest, 1, kMostThreads);
  const auto work = [&] {
    PageBuffer image(largest / kPageBytes);
    std::vector<BadRecord> bad;
    std::map<NamespaceId, Tally> mine;
    for (std::size_t i = next.fetch_add(1); i < contents.live.size() && !stop.load(); i = next.fetch_add(1)) {
      const Live& record = contents.live[i];
      const std::uint64_t bytes = record.extent.pages * kPageBytes;
      NamespaceId ns;
      verify_one(record, contents.regions[record.extent.region].report.sequence, image.data(), bad, sequences[i], ns);
      if (sequences[i] != 0) {
        Tally& tally = mine[ns];
        ++tally.records;
        tally.bytes += bytes;
      }
      done_records.fetch_add(1);
      done_bytes.fetch_add(bytes);
    }
    std::lock_guard lock(mutex);
    std::move(bad.begin(), bad.end(), std::back_inserter(out.bad));
    for (const auto& [ns, tally] : mine) {
      tallies[ns].records += tally.records;
      tallies[ns].bytes += tally.bytes;
      out.verified.records += tally.records;
      out.verified.bytes += tally.bytes;
    }
    --running;
    changed.notify_all();
  };
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = running; i > 0; --i) threads.emplace_back(work);
    std::unique_lock lock(mutex);
    while (!changed.wait_for(lock, kProgressInterval, [&] { return running == 0; })) {
      lock.unlock();
      if (progress && !progress({done_records.load(), done_bytes.load()}, out.total)) stop.store(true);
      lock.lock();
    }
  }
  if (progress && !stop.load()) progress({done_records.load(), done_bytes.load()}, out.total);
  out.stopped = stop.load();

  // Within a region records lie in the order of their sequences.
  std::uint64_t before = 0;
  for (std::size_t i = 0; i < contents.live.size(); ++i) {
    const Live& record = contents.live[i];
    if (i > 0 && contents.live[i - 1].extent.region != record.extent.region) before = 0;
    if (sequences[i] == 0) continue;
    if (sequences[i] <= before) {
      out.bad.push_back(
          {record.key, record.extent.region, record.extent.page, record.extent.pages, "record sequence",
           "the record says " + std::to_string(sequences[i]) + ", one before it in its region " + std::to_string(before)});
      --out.verified.records;
      out.verified.bytes -= record.extent.pages * kPageBytes;
    }
    before = std::max(before, sequences[i]);
  }
  std::sort(out.bad.begin(), out.bad.end(),
            [](const BadRecord& a, const BadRecord& b) { return a.region != b.region ? a.region < b.region : a.page < b.page; });
  for (const auto& [ns, tally] : tallies) out.namespaces.push_back({ns, tally});
  return out;
}

}  // namespace lmcn::nvme
