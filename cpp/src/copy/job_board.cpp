#include "copy/job_board.hpp"

#include <algorithm>
#include <string>
#include <utility>

namespace lmcn {

Status JobBoard::begin(std::uint64_t id) {
  std::lock_guard lock(mutex_);
  if (!under_way_.insert(id).second) {
    return {Code::kInvalidArgument, "job id is " + std::to_string(id) + ", must differ from those of unfinished jobs"};
  }
  std::erase_if(remembered_, [id](const auto& job) { return job.first == id; });
  return {};
}

void JobBoard::end(CopyDone done, bool remember) {
  {
    std::lock_guard lock(mutex_);
    under_way_.erase(done.id);
    if (remember) {
      Status status;
      if (!done.ok) status = {Code::kAborted, "job " + std::to_string(done.id) + " failed: " + done.message};
      remembered_.emplace_back(done.id, std::move(status));
      if (remembered_.size() > kRemembered) remembered_.pop_front();
    }
    done_.push_back(std::move(done));
  }
  ended_.notify_all();
}

void JobBoard::strand(std::uint64_t id, const Status& why) {
  {
    std::lock_guard lock(mutex_);
    stranded_.insert(id);
    if (why_stranded_.ok()) why_stranded_ = why;
  }
  ended_.notify_all();
}

Status JobBoard::stranded() const {
  std::lock_guard lock(mutex_);
  return why_stranded_;
}

std::vector<CopyDone> JobBoard::poll() {
  std::lock_guard lock(mutex_);
  return std::exchange(done_, {});
}

Status JobBoard::ended(std::uint64_t id) {
  std::lock_guard lock(mutex_);
  if (under_way_.contains(id)) {
    return {Code::kInvalidArgument, "job " + std::to_string(id) + " was not submitted layer by layer"};
  }
  const auto found = std::ranges::find(remembered_, id, [](const auto& job) { return job.first; });
  if (found != remembered_.end()) return found->second;
  return {Code::kNotFound, "job " + std::to_string(id) + ": no job layer by layer has this id"};
}

Status JobBoard::wait(std::span<const std::uint64_t> ids, std::chrono::milliseconds timeout) {
  std::unique_lock lock(mutex_);
  const auto under_way = [&](std::uint64_t id) { return under_way_.contains(id); };
  const auto stranded = [&](std::uint64_t id) { return stranded_.contains(id); };
  const auto known = [&] { return std::ranges::none_of(ids, under_way) || std::ranges::any_of(ids, stranded); };
  if (ended_.wait_for(lock, std::min(timeout, kLongestWait), known)) {
    return std::ranges::any_of(ids, stranded) ? why_stranded_ : Status();
  }
  return {Code::kDeadlineExceeded, std::to_string(std::ranges::count_if(ids, under_way)) + " of " + std::to_string(ids.size()) +
                                       " jobs under way after " + std::to_string(timeout.count()) + " ms, the first is job " +
                                       std::to_string(*std::ranges::find_if(ids, under_way))};
}

}  // namespace lmcn
