#include "nvme/in_flight.hpp"

#include <algorithm>

namespace lmcn::nvme {

InFlight::Ticket InFlight::enter(Lane lane, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  const std::uint64_t id = next_id_++;
  of(lane).emplace_hint(of(lane).end(), id, Operation{now, Clock::time_point::max()});
  return {lane, id};
}

void InFlight::leave(Ticket ticket, Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  Operations& lane = of(ticket.lane);
  auto at = lane.erase(lane.find(ticket.id));
  while (at != lane.begin() && std::prev(at)->second.overtaken == Clock::time_point::max()) {
    --at;
    at->second.overtaken = now;
  }
  if (ticket.lane == Lane::kRead) last_read_ = std::max(last_read_, now);
  if (ticket.lane != Lane::kDirect) last_any_ = std::max(last_any_, now);
  if (std::all_of(operations_.begin(), operations_.end(), [](const Operations& each) { return each.empty(); })) {
    zero_.notify_all();
  }
}

void InFlight::wait_zero() {
  std::unique_lock lock(mutex_);
  zero_.wait(lock,
             [this] { return std::all_of(operations_.begin(), operations_.end(), [](const auto& each) { return each.empty(); }); });
}

InFlight::Clock::duration InFlight::silence(Clock::time_point now, Clock::duration patience) const {
  const std::lock_guard lock(mutex_);
  Clock::duration longest{0};
  // The first of a lane was begun, and overtaken, before all others of it.
  const auto judge = [&](Lane lane, Clock::time_point last_end, bool in_order) {
    if (of(lane).empty()) return;
    const Operation& oldest = of(lane).begin()->second;
    Clock::time_point since = std::max(oldest.begun, last_end);
    if (in_order) since = std::min(since, oldest.overtaken);
    if (now - oldest.begun > patience) since = oldest.begun;
    longest = std::max(longest, now - since);
  };
  judge(Lane::kRead, last_read_, true);
  judge(Lane::kWrite, last_any_, true);
  judge(Lane::kSync, last_any_, false);
  judge(Lane::kDirect, last_any_, false);
  return longest;
}

void InFlight::excuse(Clock::time_point now) {
  const std::lock_guard lock(mutex_);
  last_read_ = last_any_ = now;
  for (Operations& lane : operations_) {
    for (auto& [id, operation] : lane) {
      operation.begun = now;
      if (operation.overtaken != Clock::time_point::max()) operation.overtaken = now;
    }
  }
}

}  // namespace lmcn::nvme
