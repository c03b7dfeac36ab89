#include "copy/job_outcome.hpp"

#include <algorithm>
#include <atomic>
#include <map>
#include <utility>

#include "base/seq_points.hpp"
#include "memory/slot_image.hpp"

namespace lmcn {
namespace {

// The header is in memory that another process writes.
template <class T>
T load(const T& field) {
  return std::atomic_ref<T>(const_cast<T&>(field)).load(std::memory_order_acquire);
}

Status check_generation(const CopyGeometry& geometry, const CopyItem& item) {
  const SlotHeader& header = *slot_header(geometry.image(item));
  const std::string where = "slot at " + std::to_string(item.slot_offset);
  if (const std::uint64_t magic = load(header.magic); magic != kSlotMagic) {
    return {Code::kCorruption, where + ": no slot header there (magic " + std::to_string(magic) + ")"};
  }
  if (const std::uint32_t generation = load(header.generation); generation != item.generation) {
    return {Code::kAborted, where + ": its generation is " + std::to_string(generation) + ", the job's is " +
                                std::to_string(item.generation) + ": the slot was handed out anew"};
  }
  return {};
}

}  // namespace

Status layers_deadline(std::uint64_t id, std::uint32_t layers, std::chrono::milliseconds timeout) {
  return {Code::kDeadlineExceeded, "job " + std::to_string(id) + ": the first " + std::to_string(layers) +
                                       " layers are not in place after " + std::to_string(timeout.count()) + " ms"};
}

Status JobOutcome::job_failed(const CopyJob& job, const Status& why) {
  return {Code::kAborted, "job " + std::to_string(job.id) + " failed: " + why.message()};
}

JobOutcome::JobOutcome(const CopyGeometry& geometry, const CopyJob& job)
    : geometry_(&geometry), job_(&job), failed_(job.items.size(), false) {}

Status JobOutcome::check_slot(const CopyGeometry& geometry, const CopyItem& item) {
  LMCN_RETURN_IF_ERROR(check_generation(geometry, item));
  const SlotHeader& header = *slot_header(geometry.image(item));
  const std::uint32_t ranks = load(header.rank_count);
  const std::uint64_t payload_bytes = load(header.payload_bytes);
  if (geometry.replicated() && (ranks != 1 || payload_bytes != geometry.rank_bytes())) {
    return {Code::kInvalidArgument, "slot at " + std::to_string(item.slot_offset) + ": payload of " +
                                        std::to_string(payload_bytes) + " bytes in " + std::to_string(ranks) +
                                        " parts, expected one of " + std::to_string(geometry.rank_bytes()) + " for all ranks"};
  }
  if (geometry.part() >= ranks || payload_bytes != ranks * geometry.rank_bytes()) {
    return {Code::kInvalidArgument, "slot at " + std::to_string(item.slot_offset) + ": payload of " +
                                        std::to_string(payload_bytes) + " bytes for " + std::to_string(ranks) + " ranks, rank " +
                                        std::to_string(geometry.rank()) + " needs " + std::to_string(geometry.rank_bytes()) +
                                        " bytes a rank"};
  }
  return {};
}

void JobOutcome::fail_item(std::size_t index, const Status& why) {
  if (message_.empty()) message_ = "item " + std::to_string(index) + ": " + why.message();
  failed_[index] = true;
}

void JobOutcome::fail_all(const Status& why) {
  if (message_.empty()) message_ = why.message();
  failed_.assign(failed_.size(), true);
}

void JobOutcome::write_words() {
  std::map<std::uint64_t, std::vector<std::size_t>> items_of_slot;
  for (std::size_t i = 0; i < job_->items.size(); ++i) items_of_slot[job_->items[i].slot_offset].push_back(i);
  for (const auto& [offset, items] : items_of_slot) {
    const CopyItem& item = job_->items[items.front()];
    std::byte* const image = geometry_->image(item);
    const bool gather = job_->direction == CopyDirection::kGather;
    if (gather) {
      LMCN_SEQ_POINT("copier.before_publish");
    } else {
      LMCN_SEQ_POINT("copier.before_scatter_done");
    }
    if (const Status ours = check_generation(*geometry_, item); !ours.ok()) {
      for (const std::size_t i : items) fail_item(i, ours);
      continue;
    }
    const bool ok = std::ranges::none_of(items, [&](std::size_t i) { return failed_[i]; });
    if (gather) {
      publish_rank(image, geometry_->rank(), item.generation, ok ? RankState::kOk : RankState::kFailed);
    } else {
      count_load_done(image, geometry_->rank());
    }
  }
}

CopyDone JobOutcome::done(double seconds) && {
  CopyDone done;
  done.id = job_->id;
  done.seconds = seconds;
  done.message = std::move(message_);
  for (std::size_t i = 0; i < failed_.size(); ++i) {
    if (failed_[i]) {
      done.failed_items.push_back(static_cast<std::uint32_t>(i));
    } else {
      done.bytes += geometry_->item_bytes(job_->items[i]);
    }
  }
  done.ok = done.failed_items.empty() && done.message.empty();
  return done;
}

}  // namespace lmcn
