#include "io/faulty_engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "io/transfer.hpp"

namespace lmcn::io {
namespace {

constexpr std::uint64_t kBlock = Transfer::kAlignment;

struct Free {
  void operator()(std::byte* p) const noexcept { std::free(p); }
};
using Block = std::unique_ptr<std::byte, Free>;

std::uint64_t round_up(std::uint64_t bytes) {
  return (bytes + kBlock - 1) / kBlock * kBlock;
}

Block allocate(std::uint64_t bytes) {
  Block block(static_cast<std::byte*>(std::aligned_alloc(kBlock, round_up(std::max<std::uint64_t>(bytes, 1)))));
  if (block == nullptr) throw std::bad_alloc();
  return block;
}

bool applies(Fault::Kind kind, Op op) {
  switch (kind) {
    case Fault::Kind::kShort:
      return op != Op::kSync;
    case Fault::Kind::kFlipBit:
      return op == Op::kRead;
    case Fault::Kind::kTornWrite:
      return op == Op::kWrite;
    case Fault::Kind::kError:
    case Fault::Kind::kHold:
    case Fault::Kind::kDrop:
      return true;
  }
  return false;
}

bool matches(const Fault& fault, const IoRequest& request) {
  if (!applies(fault.kind, request.op)) return false;
  if (fault.op && *fault.op != request.op) return false;
  if (fault.fd && *fault.fd != request.fd) return false;
  if (!fault.ranged) return true;
  if (request.op == Op::kSync) return false;
  return request.offset < fault.range_end && request.offset + std::max<std::uint64_t>(request.bytes, 1) > fault.range_begin;
}

std::uint64_t asked(const IoRequest& request) {
  return request.op == Op::kSync ? 0 : request.bytes;
}

}  // namespace

/// A request under way whose completion passes through this engine; its address is the inner request's tag.
struct FaultyEngine::Flight {
  IoRequest original;
  Fault fault;
  std::optional<IoResult> result;  // fixed in advance: the inner request only carries it to an engine thread
  Block copy;                      // what a torn or short write writes instead
  std::vector<std::byte> tail;     // memory after the end of a short read
};

FaultyEngine::FaultyEngine(std::unique_ptr<IoEngine> inner) : inner_(inner.release()) {}

FaultyEngine::~FaultyEngine() {
  std::deque<Withheld> left;
  {
    const std::lock_guard lock(mutex_);
    closing_ = true;
    left.swap(withheld_);
  }
  std::vector<IoRequest> carriers;
  for (const Withheld& waiting : left) {
    carriers.push_back(carrier(waiting.request, waiting.result.value_or(unstarted_result(waiting.request, ECANCELED))));
  }
  inner_->submit(carriers);
  delete inner_;
}

FaultyEngine::FaultId FaultyEngine::add(const Fault& fault) {
  const std::lock_guard lock(mutex_);
  rules_.emplace(next_id_, Rule{fault});
  return next_id_++;
}

void FaultyEngine::remove(FaultId id) {
  const std::lock_guard lock(mutex_);
  rules_.erase(id);
}

void FaultyEngine::clear() {
  const std::lock_guard lock(mutex_);
  rules_.clear();
}

std::size_t FaultyEngine::withheld() const {
  const std::lock_guard lock(mutex_);
  return withheld_.size();
}

bool FaultyEngine::wait_withheld(std::size_t count, std::chrono::milliseconds timeout) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, timeout, [&] { return withheld_.size() >= count; });
}

std::size_t FaultyEngine::release(std::size_t count, int error) {
  std::vector<IoRequest> go_on;
  {
    const std::lock_guard lock(mutex_);
    for (count = std::min(count, withheld_.size()); go_on.size() < count; withheld_.pop_front()) {
      go_on.push_back(resumed(withheld_.front(), error));
    }
  }
  inner_->submit(go_on);
  return go_on.size();
}

IoRequest FaultyEngine::resumed(const Withheld& waiting, int error) {
  if (error != 0) return carrier(waiting.request, unstarted_result(waiting.request, error));
  if (waiting.result) return carrier(waiting.request, *waiting.result);
  return waiting.request;
}

FaultCounts FaultyEngine::counts() const {
  const std::lock_guard lock(mutex_);
  return counts_;
}

void FaultyEngine::submit(std::span<const IoRequest> requests) {
  std::vector<IoRequest> forwarded;
  forwarded.reserve(requests.size());
  for (const IoRequest& request : requests) {
    const std::optional<Fault> fault = fault_for(request);
    if (!fault) {
      forwarded.push_back(request);
    } else if (const std::optional<IoRequest> instead = altered(request, *fault)) {
      forwarded.push_back(*instead);
    }
  }
  inner_->submit(forwarded);
}

std::optional<Fault> FaultyEngine::fault_for(const IoRequest& request) {
  const std::lock_guard lock(mutex_);
  ++counts_.requests;
  std::optional<Fault> chosen;
  for (auto& [id, rule] : rules_) {
    if (!matches(rule.fault, request)) continue;
    ++rule.matches;
    const bool due =
        rule.fault.nth != 0 ? rule.matches == rule.fault.nth : rule.matches % std::max<std::uint64_t>(rule.fault.every, 1) == 0;
    if (due && !chosen) chosen = rule.fault;
  }
  return chosen;
}

// What to hand to the inner engine instead; nothing when the request is held.
std::optional<IoRequest> FaultyEngine::altered(const IoRequest& request, const Fault& fault) {
  if (fault.kind == Fault::Kind::kHold) {
    const std::lock_guard lock(mutex_);
    if (closing_) return request;
    withheld_.push_back({request, std::nullopt});
    ++counts_.held;
    changed_.notify_all();
    return std::nullopt;
  }
  if (fault.kind == Fault::Kind::kError) {
    const std::lock_guard lock(mutex_);
    ++counts_.failed;
    return carrier(request, unstarted_result(request, fault.error));
  }
  auto flight = std::make_unique<Flight>(Flight{request, fault, std::nullopt, nullptr, {}});
  IoRequest inner = request;
  if (request.op == Op::kRead && fault.kind == Fault::Kind::kShort) {
    const std::uint64_t missing = std::min(fault.bytes, request.bytes);
    flight->tail.assign(request.data + (request.bytes - missing), request.data + request.bytes);
  } else if (request.op == Op::kWrite && fault.kind != Fault::Kind::kDrop) {
    const std::uint64_t kept = fault.kind == Fault::Kind::kTornWrite ? std::min(fault.bytes, request.bytes)
                                                                     : request.bytes - std::min(fault.bytes, request.bytes);
    inner.bytes = std::min(round_up(kept), request.bytes);
    flight->copy = allocate(inner.bytes);
    inner.data = flight->copy.get();
    const std::uint64_t whole = kept / kBlock * kBlock;
    if (kept != whole) {
      const Block old = allocate(kBlock);
      std::memset(old.get(), 0, kBlock);
      if (::pread(request.fd, old.get(), kBlock, static_cast<off_t>(request.offset + whole)) < 0) std::memset(old.get(), 0, kBlock);
      std::memcpy(inner.data + whole, old.get(), inner.bytes - whole);
    }
    std::memcpy(inner.data, request.data, kept);
  }
  inner.tag = reinterpret_cast<std::uint64_t>(flight.release());
  inner.sink = this;
  return inner;
}

// Brings a result that is known already to a sink on an engine thread: an empty read whose own result nobody looks at.
IoRequest FaultyEngine::carrier(const IoRequest& request, const IoResult& result) {
  alignas(kBlock) static std::byte nowhere[kBlock];
  auto flight = std::make_unique<Flight>(Flight{request, {}, result, nullptr, {}});
  return {Op::kRead, request.fd, nowhere, 0, 0, reinterpret_cast<std::uint64_t>(flight.release()), this};
}

void FaultyEngine::on_io(const IoResult& inner) noexcept {
  const std::unique_ptr<Flight> flight(reinterpret_cast<Flight*>(inner.tag));
  const IoRequest& request = flight->original;
  if (flight->result) return request.sink->on_io(*flight->result);

  IoResult result{request.tag, asked(request), inner.actual, inner.error};
  const bool good = inner.error == 0 && inner.actual == inner.expected;
  {
    const std::lock_guard lock(mutex_);
    switch (flight->fault.kind) {
      case Fault::Kind::kShort:
        if (!good) break;
        result.actual = request.bytes - std::min(flight->fault.bytes, request.bytes);
        if (!flight->tail.empty()) std::memcpy(request.data + result.actual, flight->tail.data(), flight->tail.size());
        ++counts_.shortened;
        break;
      case Fault::Kind::kFlipBit:
        if (flight->fault.bytes >= inner.actual) break;
        request.data[flight->fault.bytes] ^= static_cast<std::byte>(flight->fault.mask);
        ++counts_.flipped;
        break;
      case Fault::Kind::kTornWrite:
        if (!good) break;
        result.actual = request.bytes;
        ++counts_.torn;
        break;
      case Fault::Kind::kDrop:
        if (closing_) break;
        withheld_.push_back({request, result});
        ++counts_.dropped;
        changed_.notify_all();
        return;
      case Fault::Kind::kError:
      case Fault::Kind::kHold:
        break;
    }
  }
  request.sink->on_io(result);
}

}  // namespace lmcn::io
