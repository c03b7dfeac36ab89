#include "base/seq_points.hpp"

#ifdef LMCN_SEQ_POINTS

#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

namespace lmcn {
namespace {

struct Point {
  bool held = false;
  std::uint32_t arrivals = 0;
  std::uint64_t releases = 0;  // a thread leaves when this moves, whether or not the point is held when it wakes
};

// mutex guards points and every Point. `tracked` is points.size(): reach() takes the mutex only when a test holds something.
struct Registry {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, std::shared_ptr<Point>, std::less<>> points;
  std::atomic<std::size_t> tracked{0};
};

Registry& registry() {
  static auto* const instance = new Registry;  // never destroyed: threads may outlive main()
  return *instance;
}

Point& held_since_reset(Registry& r, std::string_view name, const char* caller) {
  const auto it = r.points.find(name);
  if (it == r.points.end()) {
    throw std::logic_error("SeqPoints::" + std::string(caller) + "(\"" + std::string(name) + "\"): no hold() of it since reset()");
  }
  return *it->second;
}

}  // namespace

void SeqPoints::hold(std::string_view name) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  auto it = r.points.find(name);
  if (it == r.points.end()) it = r.points.emplace(name, std::make_shared<Point>()).first;
  if (it->second->held) throw std::logic_error("SeqPoints::hold(\"" + std::string(name) + "\"): held already");
  it->second->held = true;
  it->second->arrivals = 0;
  r.tracked.store(r.points.size(), std::memory_order_seq_cst);
}

bool SeqPoints::wait_until_reached(std::string_view name, std::chrono::milliseconds timeout, std::uint32_t arrivals) {
  Registry& r = registry();
  std::unique_lock lock(r.mutex);
  held_since_reset(r, name, "wait_until_reached");
  const std::shared_ptr<Point> point = r.points.find(name)->second;
  return r.changed.wait_for(lock, timeout, [&] { return point->arrivals >= arrivals; });
}

void SeqPoints::release(std::string_view name) {
  Registry& r = registry();
  {
    const std::lock_guard lock(r.mutex);
    Point& point = held_since_reset(r, name, "release");
    point.held = false;
    ++point.releases;
  }
  r.changed.notify_all();
}

void SeqPoints::step(std::string_view name) {
  Registry& r = registry();
  {
    const std::lock_guard lock(r.mutex);
    Point& point = held_since_reset(r, name, "step");
    if (!point.held) throw std::logic_error("SeqPoints::step(\"" + std::string(name) + "\"): released already");
    point.arrivals = 0;
    ++point.releases;
  }
  r.changed.notify_all();
}

void SeqPoints::reset() {
  Registry& r = registry();
  {
    const std::lock_guard lock(r.mutex);
    for (auto& [name, point] : r.points) ++point->releases;
    r.points.clear();
    r.tracked.store(0, std::memory_order_seq_cst);
  }
  r.changed.notify_all();
}

void SeqPoints::reach(std::string_view name) {
  Registry& r = registry();
  if (r.tracked.load(std::memory_order_relaxed) == 0) return;
  std::unique_lock lock(r.mutex);
  const auto it = r.points.find(name);
  if (it == r.points.end()) return;
  const std::shared_ptr<Point> point = it->second;
  ++point->arrivals;
  r.changed.notify_all();
  if (!point->held) return;
  const std::uint64_t releases = point->releases;
  r.changed.wait(lock, [&] { return point->releases != releases; });
}

}  // namespace lmcn

#endif
