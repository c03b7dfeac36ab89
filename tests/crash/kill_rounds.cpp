#include "kill_rounds.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <new>
#include <system_error>

#include "chunks.hpp"
#include "kill_store.hpp"
#include "memory/unique_fd.hpp"
#include "nvme/directory.hpp"
#include "store/store_core.hpp"

namespace lmcn::crash {
namespace {

constexpr double kWantedShare = 0.99;      // of the acknowledged records in sealed regions
constexpr int kChildPatienceMs = 300'000;  // for a child that kills itself at an event: it works without end

/// What both processes see.
struct Shared {
  Ledger ledger;
  Judgement by_child;
};

Shared* map_shared() {
  void* memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  return new (memory) Shared{};
}

struct Totals {
  std::uint64_t rounds = 0, at_time = 0, at_event = 0, while_opening = 0;
  std::uint64_t judged_by_parent = 0, judged_by_child = 0;
  Judgement sum;  // allocated_bytes: the most
};

void add(Totals& totals, const Judgement& j) {
  Judgement& sum = totals.sum;
  sum.expected += j.expected, sum.kept += j.kept;
  sum.expected_sealed += j.expected_sealed, sum.kept_sealed += j.kept_sealed;
  sum.reused += j.reused, sum.readable += j.readable;
  sum.allocated_bytes = std::max(sum.allocated_bytes, j.allocated_bytes);
}

double share(std::uint64_t part, std::uint64_t whole) {
  return whole == 0 ? 1.0 : static_cast<double>(part) / static_cast<double>(whole);
}

class KillRounds {
 public:
  KillRounds(const Options& options, std::string directory)
      : options_(options), directory_(std::move(directory)), shared_(map_shared()), random_(options.seed) {}
  ~KillRounds() { ::munmap(shared_, sizeof(Shared)); }

  bool run() {
    for (totals_.rounds = 0; totals_.rounds < options_.rounds; ++totals_.rounds) {
      if (!one_round(totals_.rounds + 1 == options_.rounds)) return false;
      if ((totals_.rounds + 1) % 50 == 0) progress();
    }
    if (totals_.judged_by_child + totals_.judged_by_parent == 0 || totals_.sum.expected_sealed == 0) {
      shared_->ledger.fail("nothing was proven: no acknowledged record in a sealed region was ever expected");
    }
    if (share(totals_.sum.kept_sealed, totals_.sum.expected_sealed) < kWantedShare) {
      shared_->ledger.fail("fewer than 99 % of the acknowledged records in sealed regions were there");
    }
    return !shared_->ledger.failed;
  }

  const Totals& totals() const { return totals_; }
  const Ledger& ledger() const { return shared_->ledger; }

 private:
  bool one_round(bool last) {
    ChildPlan plan;
    plan.store = {directory_, random_.one_in(2) ? "threads" : "auto"};
    plan.seed = random_();
    const std::uint64_t kind = random_.below(8);
    plan.judge_first = kind >= 2 && judgement_due_;
    std::uint64_t kill_after_us = 0;
    if (kind == 0) {
      plan.kill_at = 1 + random_.below(40);  // recovery reads one page of each region
      ++totals_.while_opening;
    } else if (kind < 5) {
      plan.kill_at = 1 + random_.below(random_.one_in(2) ? 100 : 1500);
      ++totals_.at_event;
    } else {
      kill_after_us = random_.below(random_.one_in(4) ? 5'000 : 60'000);
      ++totals_.at_time;
    }
    shared_->ledger.judged = false;
    shared_->by_child = {};
    if (!kill_a_child(plan, kill_after_us)) return false;
    if (shared_->ledger.judged) {
      add(totals_, shared_->by_child);
      ++totals_.judged_by_child;
      if (!nothing_lost(shared_->by_child)) return false;
    }
    judgement_due_ = true;
    if (!last && !random_.one_in(3)) return true;
    return judge_here();
  }

  bool kill_a_child(ChildPlan plan, std::uint64_t kill_after_us) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw std::system_error(errno, std::generic_category(), "pipe2");
    const UniqueFd ours(ends[0]);
    UniqueFd childs(ends[1]);
    plan.ready_fd = ends[1];
    const pid_t child = ::fork();
    if (child < 0) throw std::system_error(errno, std::generic_category(), "fork");
    if (child == 0) {
      ::close(ends[0]);
      run_child(plan, shared_->ledger, shared_->by_child);
    }
    childs.reset();
    pollfd pipe{.fd = ours.get(), .events = POLLIN, .revents = 0};
    char byte = 0;
    // The byte, or the end of the child's side.
    if (::poll(&pipe, 1, kChildPatienceMs) == 1 && ::read(ours.get(), &byte, 1) == 1) {
      const timespec delay{.tv_sec = 0, .tv_nsec = static_cast<long>(kill_after_us * 1000)};
      const timespec patience{.tv_sec = kChildPatienceMs / 1000, .tv_nsec = 0};
      const bool alive = ::ppoll(&pipe, 1, plan.kill_at == 0 ? &delay : &patience, nullptr) == 0;
      if (alive && plan.kill_at != 0) shared_->ledger.fail("the child never came to event " + std::to_string(plan.kill_at));
    }
    ::kill(child, SIGKILL);
    int status = 0;
    if (::waitpid(child, &status, 0) != child) throw std::system_error(errno, std::generic_category(), "waitpid");
    if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
      shared_->ledger.fail("the child ended by itself, status " + std::to_string(status));
    }
    return !shared_->ledger.failed;
  }

  bool judge_here() {
    shared_->ledger.kill_at = 0;
    auto store = open_store({directory_, "auto"}, shared_->ledger);
    if (!store.ok()) {
      shared_->ledger.fail("the store could not be opened after a kill: " + store.status().to_string());
      return false;
    }
    const Judgement judgement = judge(**store, shared_->ledger, directory_);
    add(totals_, judgement);
    ++totals_.judged_by_parent;
    const Status closed = (*store)->close(std::chrono::seconds(60));
    if (!closed.ok()) shared_->ledger.fail("close: " + closed.to_string());
    judgement_due_ = false;
    return !shared_->ledger.failed && nothing_lost(judgement);
  }

  /// A kill takes nothing that was acknowledged: docs/format.md promises more than the 99 % that the design asks for.
  bool nothing_lost(const Judgement& judgement) {
    if (judgement.kept == judgement.expected) return true;
    shared_->ledger.fail(std::to_string(judgement.expected - judgement.kept) + " of " + std::to_string(judgement.expected) +
                         " acknowledged records are gone, first " + judgement.first_lost);
    return false;
  }

  void progress() const {
    std::fprintf(stderr, "kill: %llu of %llu kills, %llu records there of %llu acknowledged (sealed %llu of %llu)\n",
                 static_cast<unsigned long long>(totals_.rounds + 1), static_cast<unsigned long long>(options_.rounds),
                 static_cast<unsigned long long>(totals_.sum.kept), static_cast<unsigned long long>(totals_.sum.expected),
                 static_cast<unsigned long long>(totals_.sum.kept_sealed),
                 static_cast<unsigned long long>(totals_.sum.expected_sealed));
  }

  const Options& options_;
  const std::string directory_;
  Shared* const shared_;
  Random random_;
  Totals totals_;
  bool judgement_due_ = false;
};

void print(const Options& options, const Totals& t, const Ledger& l, bool held) {
  const char* const form =
      options.json
          ? "{\"test\": \"kill\", \"held\": %s, \"seed\": %llu, \"rounds\": %llu, \"kills_at_time\": %llu, \"kills_at_io_event\": "
            "%llu, \"kills_while_opening\": %llu, \"judged_by_parent\": %llu, \"judged_by_child\": %llu, \"acknowledged\": %llu, "
            "\"there\": %llu, \"sealed\": %llu, \"sealed_there\": %llu, \"regions_reused\": %llu, \"reads\": %llu, \"puts\": %llu, "
            "\"aborts\": %llu, \"hits\": %llu, \"erases\": %llu, \"flushes\": %llu, \"clears\": %llu, \"most_allocated_bytes\": "
            "%llu, \"limit_bytes\": %llu}\n"
          : "kill: held %s, seed %llu, %llu rounds (%llu at a time, %llu at an I/O event, %llu while opening);\n"
            "  judged %llu times by the parent and %llu by the next child;\n  acknowledged records %llu, there %llu; in sealed "
            "regions %llu, there %llu; "
            "reused meanwhile %llu; chunks read and checked %llu;\n  the children: puts %llu, aborts %llu, hits %llu, erases %llu, "
            "flushes %llu, clears %llu; most bytes allocated %llu of %llu\n";
  const auto n = [](std::uint64_t value) { return static_cast<unsigned long long>(value); };
  std::printf(form, held ? "true" : "false", n(options.seed), n(t.rounds), n(t.at_time), n(t.at_event), n(t.while_opening),
              n(t.judged_by_parent), n(t.judged_by_child), n(t.sum.expected), n(t.sum.kept), n(t.sum.expected_sealed),
              n(t.sum.kept_sealed), n(t.sum.reused), n(t.sum.readable), n(l.puts), n(l.aborts), n(l.hits), n(l.erases),
              n(l.flushes), n(l.clears_begun), n(t.sum.allocated_bytes), n(kLimitBytes));
  std::fflush(stdout);
}

}  // namespace

int run_kill_rounds(const Options& options) {
  std::string directory = (options.directory / "lmcn_crash_XXXXXX").string();
  if (::mkdtemp(directory.data()) == nullptr) throw std::system_error(errno, std::generic_category(), "mkdtemp " + directory);
  KillRounds rounds(options, directory);
  const bool held = rounds.run();
  print(options, rounds.totals(), rounds.ledger(), held);
  if (held) {
    std::filesystem::remove_all(directory);
    return 0;
  }
  std::fprintf(stderr, "crash_test kill --seed %llu: round %llu: %s\nThe store is kept in %s\n",
               static_cast<unsigned long long>(options.seed), static_cast<unsigned long long>(rounds.totals().rounds + 1),
               rounds.ledger().failure, directory.c_str());
  return 1;
}

}  // namespace lmcn::crash
