#include "io/transfer.hpp"

#include "io_support.hpp"

namespace lmcn::io {
namespace {

// Addresses that are never touched.
std::byte* const kBase = reinterpret_cast<std::byte*>(std::uintptr_t{1} << 40);

struct Script : Transfer {
  Script(Op op, std::uint64_t bytes) : Transfer(IoRequest{.op = op, .data = kBase, .bytes = bytes, .offset = 1 << 20, .tag = 9}) {}
  /// Where the next piece begins, relative to the request; checks that memory and file agree.
  std::uint64_t at() const {
    EXPECT_EQ(static_cast<std::uint64_t>(data() - kBase), offset() - (1 << 20));
    return offset() - (1 << 20);
  }
};

TEST(TransferTest, WholeAtOnce) {
  Script t(Op::kRead, 8192);
  EXPECT_TRUE(t.advance(8192));
  EXPECT_TRUE(t.result().status("read").ok());
  EXPECT_EQ(t.result().tag, 9u);
}

TEST(TransferTest, ShortReadGoesOnWhereItStopped) {
  Script t(Op::kRead, 16384);
  EXPECT_FALSE(t.advance(4096));
  EXPECT_EQ(t.at(), 4096u);
  EXPECT_EQ(t.bytes(), 12288u);
  EXPECT_FALSE(t.advance(8192));
  EXPECT_EQ(t.at(), 12288u);
  EXPECT_TRUE(t.advance(4096));
  EXPECT_TRUE(t.result().status("read").ok());
}

TEST(TransferTest, StopInsideABlockGoesOnAtTheBlock) {
  Script t(Op::kWrite, 16384);
  EXPECT_FALSE(t.advance(5000));
  EXPECT_EQ(t.at(), 4096u);
  EXPECT_TRUE(t.advance(12288));
  EXPECT_TRUE(t.result().status("write").ok());
}

TEST(TransferTest, EndOfFileInsideABlock) {
  Script t(Op::kRead, 8192);
  EXPECT_FALSE(t.advance(5000));
  EXPECT_TRUE(t.advance(904));  // the same bytes again, no more
  EXPECT_EQ(t.result().actual, 5000u);
  EXPECT_EQ(t.result().error, 0);
  EXPECT_EQ(t.result().status("read").code(), Code::kIoError);
}

TEST(TransferTest, EndOfFileAtABlock) {
  Script t(Op::kRead, 8192);
  EXPECT_FALSE(t.advance(4096));
  EXPECT_TRUE(t.advance(0));
  EXPECT_EQ(t.result().actual, 4096u);
  EXPECT_FALSE(t.result().status("read").ok());
}

TEST(TransferTest, AWriteThatMovesNothingIsNotGood) {
  Script t(Op::kWrite, 4096);
  EXPECT_TRUE(t.advance(0));
  EXPECT_FALSE(t.result().status("write").ok());
}

TEST(TransferTest, ErrorAfterAPartKeepsBoth) {
  Script t(Op::kWrite, 8192);
  EXPECT_FALSE(t.advance(4096));
  EXPECT_TRUE(t.advance(-ENOSPC));
  EXPECT_EQ(t.result().actual, 4096u);
  const Status status = t.result().status("pwrite /x/data.000");
  EXPECT_EQ(status.sys_errno(), ENOSPC);
  EXPECT_NE(status.message().find("pwrite /x/data.000"), std::string::npos);
  EXPECT_NE(status.message().find("4096 of 8192 bytes"), std::string::npos);
}

TEST(TransferTest, InterruptionsAreRetriedButNotForEver) {
  Script t(Op::kRead, 4096);
  EXPECT_FALSE(t.advance(-EINTR));
  EXPECT_FALSE(t.advance(-EAGAIN));
  EXPECT_TRUE(t.interrupted());
  EXPECT_EQ(t.at(), 0u);
  unsigned more = 0;
  while (!t.advance(-EAGAIN)) ++more;
  EXPECT_EQ(more, Transfer::kMaxFruitless - 2);
  EXPECT_EQ(t.result().error, EAGAIN);

  Script good(Op::kRead, 4096);
  EXPECT_FALSE(good.advance(-EINTR));
  EXPECT_TRUE(good.advance(4096));
  EXPECT_TRUE(good.result().status("read").ok());
}

TEST(TransferTest, LargeRequestsGoInPieces) {
  const std::uint64_t bytes = 2 * Transfer::kMaxPieceBytes + 4096;
  Script t(Op::kRead, bytes);
  EXPECT_EQ(t.bytes(), Transfer::kMaxPieceBytes);
  EXPECT_FALSE(t.advance(Transfer::kMaxPieceBytes));
  EXPECT_FALSE(t.advance(Transfer::kMaxPieceBytes));
  EXPECT_EQ(t.at(), 2 * Transfer::kMaxPieceBytes);
  EXPECT_EQ(t.bytes(), 4096u);
  EXPECT_TRUE(t.advance(4096));
  EXPECT_EQ(t.result().actual, bytes);
}

TEST(TransferTest, SyncHasNoBytes) {
  Script t(Op::kSync, 77);
  EXPECT_TRUE(t.advance(0));
  EXPECT_TRUE(t.result().status("fdatasync").ok());
}

TEST(IoResultTest, StatusJudgesBytesAndErrno) {
  EXPECT_TRUE((IoResult{0, 4096, 4096, 0}).status("x").ok());
  EXPECT_EQ((IoResult{0, 4096, 4096, EIO}).status("x").code(), Code::kIoError);  // an errno wins over a full count
  EXPECT_EQ((IoResult{0, 4096, 0, ECANCELED}).status("x").code(), Code::kAborted);
  EXPECT_EQ((IoResult{0, 4096, 8192, 0}).status("x").code(), Code::kInternal);
  EXPECT_EQ((IoResult{0, 4096, 4095, 0}).status("x").code(), Code::kIoError);
}

}  // namespace
}  // namespace lmcn::io
