#include "kill_store.hpp"

#include <array>
#include <map>

#include "chunks.hpp"
#include "disk.hpp"
#include "store/store_core.hpp"
#include "witness_engine.hpp"

namespace lmcn::crash {
namespace {

constexpr auto kReadDeadline = std::chrono::seconds(60);  // a machine may be slow: past it a chunk counts as lost

}  // namespace

std::uint64_t payload_bytes_of(std::uint32_t id) {
  constexpr std::array<std::uint64_t, 8> kBytes = {1, 4095, 4096, 4097, 20'000, 65'536, 100'001, 262'144};
  return kBytes[id % kBytes.size()];
}

Result<std::unique_ptr<StoreCore>> open_store(const KillStoreOptions& options, Ledger& ledger) {
  StoreOptions store_options;
  store_options.host_bytes = 4 << 20;
  store_options.max_payload_bytes = 262'144;
  store_options.directories = {options.directory};
  store_options.nvme_bytes = kLimitBytes;
  store_options.region_bytes = kRegionBytes;
  store_options.io_engine = options.io_engine;
  store_options.fail_when_locked = true;
  store_options.lock_wait = std::chrono::milliseconds(0);  // a process that was waited for holds no lock
  store_options.populate_threads = 0;
  auto store = std::make_unique<StoreCore>(store_options);
  store->wrap_engine = [&ledger](std::unique_ptr<io::IoEngine> inner) {
    return std::make_unique<WitnessEngine>(std::move(inner), ledger);
  };
  std::uint32_t region = 0;
  for (const std::uint64_t sequence : region_sequences(options.directory))
    ledger.region_sequence[region++ % kMaxRegions] = sequence;
  LMCN_RETURN_IF_ERROR(store->start());
  std::lock_guard lock(store->mu);
  store->index.for_each([&](EntryId, Entry& entry) {
    const std::uint32_t at = entry.extent.region % kMaxRegions;
    ledger.recovered[at][entry.extent.page % kRegionPages] = ledger.region_sequence[at].load();
  });
  return store;
}

void take_snapshot(StoreCore& store, Ledger& ledger) {
  const std::uint32_t next = 1 - ledger.current.load();
  Snapshot& snapshot = ledger.snapshots[next];
  snapshot.count = 0;
  {
    std::lock_guard lock(store.mu);
    store.index.for_each([&](EntryId, Entry& entry) {
      if (!entry.extent.valid() || snapshot.count == kIds) return;
      const std::uint32_t region = entry.extent.region % kMaxRegions;
      const std::uint32_t page = entry.extent.page % kRegionPages;
      // A region's extents leave the index before its next header is handed to the device.
      const std::uint64_t sequence = ledger.region_sequence[region];
      if (ledger.whole[region][page] == sequence) {
        const bool sealed = ledger.sealed_sequence[region] == sequence;
        snapshot.kept[snapshot.count++] = {id_of(entry.key, kIds), entry.extent, sequence, sealed};
      } else if (ledger.recovered[region][page] != sequence) {
        ledger.fail("acknowledged before its write ended: the record at region " + std::to_string(region) + ", page " +
                    std::to_string(page));
      }
    });
    ledger.reclaimed_regions = store.counters.reclaimed_regions;
  }
  snapshot.clears = ledger.clears_begun;
  ledger.current = next;
}

bool read_and_check(TieredStore& store, Ledger& ledger, std::span<const std::uint32_t> ids, std::uint32_t* readable) {
  *readable = 0;
  std::vector<ChunkKey> keys;
  for (const std::uint32_t id : ids) keys.push_back(key_of(id));
  const Result<ReadLease> lease = store.acquire(crash_namespace(), keys, kReadDeadline);
  if (!lease.ok()) return true;
  *readable = static_cast<std::uint32_t>(lease->slots().size());
  for (std::size_t i = 0; i < lease->slots().size(); ++i) {
    const std::uint32_t id = ids[i];
    const std::span<const std::byte> payload = lease->payload(i);
    if (ledger.attempted[id] == 0) {
      ledger.fail("id " + std::to_string(id) + " is readable and was never written");
      return false;
    }
    if (payload.size() != payload_bytes_of(id) || !holds(payload, id)) {
      ledger.fail("id " + std::to_string(id) + " is readable with wrong bytes (length " + std::to_string(payload.size()) +
                  ", right is " + std::to_string(payload_bytes_of(id)) + ")");
      return false;
    }
  }
  return true;
}

namespace {

// A record that was read whole counts as one from now on.
void note_whole(StoreCore& store, Ledger& ledger, std::uint32_t id) {
  std::lock_guard lock(store.mu);
  const EntryId entry_id = store.index.find(key_of(id));
  if (entry_id == kNoEntry || !store.index.entry(entry_id).extent.valid()) return;
  const Extent& extent = store.index.entry(entry_id).extent;
  const std::uint32_t region = extent.region % kMaxRegions;
  ledger.whole[region][extent.page % kRegionPages] = ledger.region_sequence[region].load();
}

// Whether the index leads to any record in `region`.
bool region_in_use(StoreCore& store, std::uint32_t region) {
  bool found = false;
  std::lock_guard lock(store.mu);
  store.index.for_each([&](EntryId, Entry& entry) { found = found || entry.extent.region == region; });
  return found;
}

// The acknowledged records that must be readable: no clear or erase was under way, and their region was not reused.
std::map<std::uint32_t, Kept> must_be_there(Ledger& ledger, const std::string& directory, Judgement& judgement) {
  std::map<std::uint32_t, Kept> expected;
  const Snapshot& snapshot = ledger.snapshots[ledger.current];
  if (ledger.clears_begun != snapshot.clears) return expected;
  const std::vector<std::uint64_t> on_disk = region_sequences(directory);
  for (const Kept& kept : std::span(snapshot.kept, snapshot.count)) {
    if (kept.id >= kIds) {
      ledger.fail("the store's index held a key that nobody ever wrote");
    } else if (kept.extent.region >= on_disk.size() || on_disk[kept.extent.region] != kept.sequence) {
      ++judgement.reused;
    } else if (!ledger.being_erased[kept.id]) {
      expected.emplace(kept.id, kept);
    }
  }
  return expected;
}

void judge_allocation(StoreCore& store, Ledger& ledger, const std::string& directory, Judgement& judgement) {
  judgement.allocated_bytes = allocated_bytes(directory);
  const std::uint64_t counted = store.stats().nvme_allocated_bytes;
  if (judgement.allocated_bytes > kLimitBytes || counted > kLimitBytes) {
    ledger.fail(std::to_string(judgement.allocated_bytes) + " bytes allocated, " + std::to_string(counted) +
                " by the store's count; the limit is " + std::to_string(kLimitBytes));
  }
}

}  // namespace

Judgement judge(StoreCore& store, Ledger& ledger, const std::string& directory) {
  Judgement judgement;
  const std::map<std::uint32_t, Kept> expected = must_be_there(ledger, directory, judgement);
  const std::uint64_t cleared = ledger.clears_acknowledged;
  for (std::uint32_t id = 0; id < kIds; ++id) {
    std::uint32_t readable = 0;
    if (!read_and_check(store, ledger, std::span(&id, 1), &readable)) return judgement;
    judgement.readable += readable;
    if (readable != 0) note_whole(store, ledger, id);
    if (readable != 0 && ledger.attempted[id] <= cleared) {
      ledger.fail("id " + std::to_string(id) + " is back: it was last written after clear " +
                  std::to_string(ledger.attempted[id] - 1) + ", and clear " + std::to_string(cleared) + " was acknowledged");
      return judgement;
    }
    const auto found = expected.find(id);
    if (found == expected.end()) continue;
    const Kept& kept = found->second;
    // The store that is judged has a keeper too, which may have begun to reuse the region.
    if (readable == 0 && store.stats().reclaimed_regions != 0 && !region_in_use(store, kept.extent.region)) {
      ++judgement.reused;
      continue;
    }
    ++judgement.expected;
    judgement.kept += readable;
    if (kept.sealed) {
      ++judgement.expected_sealed;
      judgement.kept_sealed += readable;
    }
    if (readable == 0 && judgement.expected - judgement.kept == 1) {
      std::snprintf(judgement.first_lost, sizeof judgement.first_lost, "id %u at region %u, page %u%s", id, kept.extent.region,
                    kept.extent.page, kept.sealed ? ", sealed" : "");
    }
  }
  judge_allocation(store, ledger, directory, judgement);
  if (!store.nvme_ready()) ledger.fail("NVMe is not in use: " + store.nvme_warning());
  return judgement;
}

}  // namespace lmcn::crash
