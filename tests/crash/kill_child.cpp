// The process that is killed: one thread that writes, clears, erases and restarts, one that reads.
#include <unistd.h>

#include <array>
#include <thread>

#include "chunks.hpp"
#include "kill_store.hpp"
#include "store/store_core.hpp"

namespace lmcn::crash {
namespace {

constexpr auto kFlushDeadline = std::chrono::seconds(60);
constexpr std::uint64_t kHotIds = 256;  // that most operations are about, so that ids are written, lost and written again

class Child {
 public:
  Child(const ChildPlan& plan, Ledger& ledger) : plan_(plan), ledger_(ledger), random_(plan.seed) {}

  void open() {
    auto opened = open_store(plan_.store, ledger_);
    if (!opened.ok()) return ledger_.fail("the child could not open the store: " + opened.status().to_string());
    store_ = std::move(opened).value();
  }
  void close() {
    const Status closed = store_->close(kFlushDeadline);
    if (!closed.ok()) ledger_.fail("close: " + closed.to_string());
    store_.reset();
  }
  StoreCore& store() { return *store_; }

  void work() {
    while (!ledger_.failed) {
      std::jthread reader([this, seed = random_()](std::stop_token stop) { read_until(stop, seed); });
      const std::uint64_t until = ledger_.operations + 50 + random_.below(400);
      while (ledger_.operations < until && !ledger_.failed) {
        one_operation();
        take_snapshot(*store_, ledger_);
        ++ledger_.operations;
      }
      reader.request_stop();
      reader.join();
      if (ledger_.failed) return;
      close();
      if (!ledger_.failed) open();
      ++ledger_.reopens;
    }
  }

 private:
  std::uint32_t any_id(Random& random) {
    return static_cast<std::uint32_t>(random.one_in(3) ? random.below(kIds) : (plan_.seed * 37 + random.below(kHotIds)) % kIds);
  }

  void one_operation() {
    const std::uint64_t dice = random_.below(1000);
    if (dice < 600) {
      put();
    } else if (dice < 680) {
      abandon();
    } else if (dice < 850) {
      hit();
    } else if (dice < 890) {
      look();
    } else if (dice < 930) {
      erase();
    } else if (dice < 996) {
      flush();
    } else {
      clear();
    }
  }

  Result<WriteLease> reserve_some(std::vector<std::uint32_t>& ids) {
    const std::uint32_t first = any_id(random_);
    std::vector<ChunkKey> keys;
    for (std::uint32_t i = 0; i <= random_.below(4); ++i) {
      ids.push_back((first + 8 * i) % kIds);  // of one length
      keys.push_back(key_of(ids.back()));
    }
    return store_->reserve(crash_namespace(), keys, payload_bytes_of(first), false);
  }

  void put() {
    std::vector<std::uint32_t> ids;
    Result<WriteLease> lease = reserve_some(ids);
    if (!lease.ok() || lease->empty()) return;
    for (std::size_t i = 0; i < lease->slots().size(); ++i) {
      const std::uint32_t id = ids[lease->positions()[i]];
      fill({lease->payload(i), lease->payload_bytes()}, id);
      lease->mark_filled(i);
      ledger_.attempted[id] = ledger_.clears_begun + 1;
    }
    ledger_.puts += lease->commit();
  }

  // Wrong bytes in slots that are given up: they must never be seen.
  void abandon() {
    std::vector<std::uint32_t> ids;
    Result<WriteLease> lease = reserve_some(ids);
    if (!lease.ok()) return;
    for (std::size_t i = 0; i < lease->slots().size(); ++i) {
      fill({lease->payload(i), lease->payload_bytes()}, kIds + ids[lease->positions()[i]]);
      if (random_.one_in(2)) lease->mark_filled(i);
    }
    lease->abort();
    ++ledger_.aborts;
  }

  void hit() {
    const std::uint32_t first = any_id(random_);
    const std::array<std::uint32_t, 3> ids = {first, (first + 1) % kIds, (first + 2) % kIds};
    std::uint32_t readable = 0;
    read_and_check(*store_, ledger_, ids, &readable);
    ledger_.hits += readable;
  }

  void look() {
    const std::unique_ptr<Request> request = store_->begin_request(crash_namespace(), {});
    std::vector<ChunkKey> keys;
    for (int i = 0; i < 6; ++i) keys.push_back(key_of(any_id(random_)));
    request->prefetch(keys);
    for (const ChunkKey& key : keys) request->lookup(key);
    store_->touch(keys);
  }

  void erase() {
    const std::uint32_t id = any_id(random_);
    ledger_.being_erased[id] = true;
    ledger_.erases += store_->erase(key_of(id)) ? 1 : 0;
    take_snapshot(*store_, ledger_);
    ledger_.being_erased[id] = false;
  }

  void flush() {
    const Status flushed = store_->flush(kFlushDeadline);
    if (!flushed.ok()) ledger_.fail("flush: " + flushed.to_string());
    ++ledger_.flushes;
  }

  void clear() {
    const std::uint64_t number = ++ledger_.clears_begun;
    store_->clear();
    flush();
    if (!ledger_.failed) ledger_.clears_acknowledged = number;
  }

  void read_until(const std::stop_token& stop, std::uint64_t seed) {
    Random random(seed);
    while (!stop.stop_requested() && !ledger_.failed) {
      const std::uint32_t id = any_id(random);
      std::uint32_t readable = 0;
      if (!read_and_check(*store_, ledger_, std::span(&id, 1), &readable)) return;
      ledger_.hits += readable;
    }
  }

  const ChildPlan& plan_;
  Ledger& ledger_;
  Random random_;
  std::unique_ptr<StoreCore> store_;
};

}  // namespace

void run_child(const ChildPlan& plan, Ledger& ledger, Judgement& judgement) {
  Child child(plan, ledger);
  const auto arm = [&] {
    ledger.events = 0;
    ledger.kill_at = plan.kill_at;
    if (::write(plan.ready_fd, "r", 1) != 1) ledger.fail("the child could not write to the pipe");
  };
  ledger.kill_at = 0;
  if (!plan.judge_first) arm();
  child.open();
  if (!ledger.failed && plan.judge_first) {
    judgement = judge(child.store(), ledger, plan.store.directory);
    take_snapshot(child.store(), ledger);
    ledger.judged = true;
    arm();
  }
  if (!ledger.failed) child.work();
  ::_exit(1);
}

}  // namespace lmcn::crash
