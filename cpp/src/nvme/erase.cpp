// Records taken out of a directory that no store owns.
//
// Invariant: after a crash at any point, open() finds only records that were there before, and those that clear_store() reported as
// gone are never found again. So, in this order, each step durable before the next:
//  1  the superblock's sequence_floor is raised above all sequences: none is used twice, whatever is lost below;
//  2  index.ckpt goes (the footers say the same);
//  3  a region that loses all its records gets a header page of zeros, which makes it one that was never used; elsewhere each
//  record
//     that goes gets a skip header in place of its own: nothing can verify as that record any more;
//  4  footers of the latter regions are written anew without them. A footer torn here does not hold, and the walk in its place
//  steps
//     over the skip headers.
#include <cstring>
#include <map>
#include <unordered_set>

#include "nvme/existing.hpp"

namespace lmcn {
namespace nvme {

Status ExistingStore::write_now(io::Op op, std::byte* data, std::uint64_t bytes, std::uint64_t offset, const char* what) {
  io::IoRequest request;
  request.op = op;
  request.fd = log_->data_.fd();
  request.data = data;
  request.bytes = bytes;
  request.offset = offset;
  return io::run_sync(*engine_, request).status(std::string(what) + " " + log_->data_.path());
}

Result<ClearReport> ExistingStore::clear_all() {
  ClearReport report;
  for (const RecoveredRecord& record : records_) {
    ++report.records;
    report.bytes += record.extent.pages * kPageBytes;
  }
  Superblock raised = log_->superblock_;
  ++raised.epoch;
  raised.sequence_floor = std::max(log_->next_region_sequence_, log_->next_record_sequence_);
  LMCN_RETURN_IF_ERROR(store_superblock(*log_->directory_, *engine_, raised));
  LMCN_RETURN_IF_ERROR(log_->directory_->remove("index.ckpt"));
  report.regions = log_->allocated_;
  LMCN_RETURN_IF_ERROR(log_->data_.truncate(0));
  return report;
}

Result<ClearReport> ExistingStore::erase(const ClearSelection& selection) {
  std::vector<std::optional<NamespaceId>> namespaces(records_.size());
  if (selection.ns) LMCN_RETURN_IF_ERROR(read_namespaces(namespaces));
  ClearReport report;
  struct Cut {
    std::vector<RecoveredRecord> goes, stays;
  };
  std::map<std::uint32_t, Cut> cuts;
  std::unordered_set<ChunkKey, ChunkKeyHash> gone;
  for (std::size_t i = 0; i < records_.size(); ++i) {
    const RecoveredRecord& record = records_[i];
    const std::int64_t prepared = log_->regions_[record.extent.region].prepared_unix_s;
    const bool old = !selection.prepared_before_unix_s || prepared < *selection.prepared_before_unix_s;
    if (selection.ns && old && !namespaces[i]) ++report.unreadable;
    const bool goes = old && (!selection.ns || namespaces[i] == selection.ns);
    (goes ? cuts[record.extent.region].goes : cuts[record.extent.region].stays).push_back(record);
    if (!goes) continue;
    gone.insert(record.key);
    ++report.records;
    report.bytes += record.extent.pages * kPageBytes;
  }
  // An earlier record of a key that goes would be found in its place.
  for (const RecoveredRecord& record : superseded_) {
    if (gone.contains(record.key)) cuts[record.extent.region].goes.push_back(record);
  }
  std::erase_if(cuts, [](const auto& cut) { return cut.second.goes.empty(); });
  if (report.records == 0) return report;

  Superblock raised = log_->superblock_;
  raised.sequence_floor = std::max(log_->next_region_sequence_, log_->next_record_sequence_);
  LMCN_RETURN_IF_ERROR(store_superblock(*log_->directory_, *engine_, raised));
  LMCN_RETURN_IF_ERROR(log_->directory_->remove("index.ckpt"));
  LMCN_RETURN_IF_ERROR(log_->directory_->sync());

  PageBuffer page(1);
  for (const auto& [region, cut] : cuts) {
    if (cut.stays.empty()) {
      std::memset(page.data(), 0, kPageBytes);
      LMCN_RETURN_IF_ERROR(
          write_now(io::Op::kWrite, page.data(), kPageBytes, log_->offset_of(region, 0), "write of a region header to"));
      continue;
    }
    for (const RecoveredRecord& record : cut.goes) {
      auto* skip = new (page.data()) SkipHeader{};
      skip->magic = kSkipMagic;
      skip->uuid = log_->uuid_;
      skip->region_sequence = log_->words_[region].sequence;
      skip->pages = record.extent.pages;
      seal_page(*skip);
      LMCN_RETURN_IF_ERROR(write_now(io::Op::kWrite, page.data(), kPageBytes, log_->offset_of(region, record.extent.page),
                                     "write of a skip header to"));
    }
  }
  LMCN_RETURN_IF_ERROR(write_now(io::Op::kSync, nullptr, 0, 0, "fdatasync of"));

  for (const auto& [region, cut] : cuts) {
    const Region& r = log_->regions_[region];
    if (cut.stays.empty() || r.state != RegionState::kSealed || r.footer_missing) continue;
    std::vector<FooterEntry> entries;
    for (const RecoveredRecord& record : cut.stays) entries.push_back({record.key, record.extent.page, record.extent.pages});
    PageBuffer footer = make_footer(entries, log_->uuid_, log_->words_[region].sequence, raised.sequence_floor);
    const std::uint64_t end = log_->offset_of(region, log_->geometry_.region_pages);
    LMCN_RETURN_IF_ERROR(write_now(io::Op::kWrite, footer.data(), footer.bytes(), end - footer.bytes(), "write of a footer to"));
  }
  LMCN_RETURN_IF_ERROR(write_now(io::Op::kSync, nullptr, 0, 0, "fdatasync of"));
  for (const auto& [region, cut] : cuts) {
    if (cut.stays.empty() && log_->data_.punch(region).ok()) ++report.regions;
  }
  return report;
}

}  // namespace nvme

Result<ClearReport> clear_store(const std::string& directory, const ClearSelection& selection) {
  Result<nvme::ExistingStore> store = nvme::ExistingStore::open(directory);
  if (!store.ok()) return store.status();
  return selection.prepared_before_unix_s || selection.ns ? store->erase(selection) : store->clear_all();
}

}  // namespace lmcn
