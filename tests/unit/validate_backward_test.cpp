// Each field of a backward problem broken in turn: one error that names the argument, and nothing written.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "flashspark/flashspark.h"

namespace flashspark {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kBig = std::numeric_limits<int64_t>::max();

// A legal problem with its memory and every gradient. B = 2, 4 query heads on 2 KV heads, D = 16, Dv = 8, Tq = 3, Tk =
// 20. score_mod adds a captured bias of each head and a captured integer.
struct World {
  flashspark_attention_backward_params p;
  flashspark_attention_params &f = p.forward;
  std::vector<float> q = std::vector<float>(2 * 3 * 4 * 16, 0.5f), k = std::vector<float>(2 * 20 * 2 * 16, 0.25f),
                     v = std::vector<float>(2 * 20 * 2 * 8, 1.0f), out = std::vector<float>(2 * 3 * 4 * 8, 1.0f),
                     lse = std::vector<float>(2 * 3 * 4, 1.0f), dout = out, dlse = lse,
                     rel = std::vector<float>(6 * 4 * 5, 0.1f), sinks = {0, 1, 2, 3}, alibi = {1, 2, 3, 4, 5, 6, 7, 8},
                     bias = {1, 2, 3, 4};
  std::vector<float> dq = std::vector<float>(q.size(), kNan), dk = std::vector<float>(k.size(), kNan),
                     dv = std::vector<float>(v.size(), kNan), drel = std::vector<float>(rel.size(), kNan),
                     dsinks = std::vector<float>(4, kNan), dalibi = std::vector<float>(8, kNan),
                     dbias = std::vector<float>(8, kNan);
  std::vector<int32_t> shift = {0, 1, 2, 3}, pages = {0, 1, 2, 3}, index = {0, 1}, cu_q = {0, 3, 6}, cu_k = {0, 20, 33},
                       used_k = {20, 13};
  float scale = 1;
  flashspark_captured_tensor captured[2] = {};
  flashspark_captured_gradient dtensors[2] = {};
  flashspark_mod *mod = nullptr;

  World() {
    flashspark_attention_backward_params_init(&p);
    f.num_seqs = 2, f.num_heads_q = 4, f.num_heads_kv = 2, f.head_dim = 16, f.head_dim_v = 8;
    f.max_seqlen_q = 3, f.max_seqlen_k = 20, f.softmax_scale = 0.25f;
    f.q = {q.data(), 3 * 64, 64, 16, FLASHSPARK_FLOAT32, 0};
    f.k = {k.data(), 20 * 32, 32, 16, FLASHSPARK_FLOAT32, 0};
    f.v = {v.data(), 20 * 16, 16, 8, FLASHSPARK_FLOAT32, 0};
    f.out = {out.data(), 3 * 32, 32, 8, FLASHSPARK_FLOAT32, 0};
    f.lse = lse.data(), f.lse_batch_stride = 12, f.lse_head_stride = 3, f.lse_token_stride = 1;
    f.sinks = sinks.data(), f.sinks_dtype = FLASHSPARK_FLOAT32;
    f.rel_logits = rel.data(), f.rel_dtype = FLASHSPARK_FLOAT32;
    f.rel_extent = f.rel_head_stride = 5, f.rel_token_stride = 20;
    f.alibi_slopes = alibi.data(), f.alibi_batch_stride = 4;
    const char *graph =
        "flashspark-graph 1\nscore\nh\nload 0 f32 1 1\nload 1 i32 1 1\nto_f32 3\nmul 0 2\nadd 5 4\nreturn 6\n";
    EXPECT_EQ(flashspark_score_mod_create(graph, &mod), FLASHSPARK_OK) << flashspark_last_error();
    captured[0] = {bias.data(), FLASHSPARK_FLOAT32, 1, {4}, {1}};
    captured[1] = {shift.data(), FLASHSPARK_INT32, 1, {4}, {1}};
    f.score_mod = {mod, captured, nullptr, 2, 0};
    p.dout = f.out, p.dout.data = dout.data();
    p.dq = f.q, p.dq.data = dq.data();
    p.dk = f.k, p.dk.data = dk.data();
    p.dv = f.v, p.dv.data = dv.data();
    p.dlse = dlse.data(), p.dsinks = dsinks.data(), p.drel_logits = drel.data(), p.dalibi_slopes = dalibi.data();
    dtensors[0] = {dbias.data(), {2}};
    p.dtensors = dtensors;
  }
  ~World() { flashspark_mod_release(mod); }
  World(const World &) = delete;

  void varlen() {
    f.cu_seqlens_q = cu_q.data(), f.cu_seqlens_k = cu_k.data();
    f.total_q = 6, f.total_k = 40, f.lse_head_stride = 6;
  }
  bool untouched() const {
    for (const std::vector<float> *gradient : {&dq, &dk, &dv, &drel, &dsinks, &dalibi, &dbias}) {
      for (const float x : *gradient) {
        if (!std::isnan(x)) return false;
      }
    }
    return true;
  }
};

struct Fault {
  const char *name;
  std::function<void(World &)> plant;
  const char *message;  // what the error must begin with
  flashspark_status status = FLASHSPARK_INVALID_ARGUMENT;
};
void PrintTo(const Fault &fault, std::ostream *os) {
  *os << fault.name;
}

template <class T>
T *misaligned(T *pointer) {
  return reinterpret_cast<T *>(reinterpret_cast<char *>(pointer) + 1);
}

const Fault kFaults[] = {
    {"size", [](World &w) { w.p.struct_size -= 8; },
     "flashspark_attention_backward_params: struct_size = ", FLASHSPARK_VERSION_MISMATCH},
    {"version", [](World &w) { w.p.abi_version = 2; },
     "flashspark_attention_backward_params: ", FLASHSPARK_VERSION_MISMATCH},
    {"forward version", [](World &w) { w.f.struct_size = 0; }, "flashspark_attention_params: struct_size = 0",
     FLASHSPARK_VERSION_MISMATCH},
    {"rules of forward", [](World &w) { w.f.head_dim = 12; }, "head_dim = 12: "},
    {"numbers of forward", [](World &w) { w.alibi[6] = kNan; }, "alibi_slopes[2] = nan: "},
    {"dropout", [](World &w) { w.f.dropout_p = 1; }, "dropout_p = 1: must be from 0"},
    {"pages",
     [](World &w) {
       w.f.page_table = w.pages.data(), w.f.page_table_stride = w.f.num_page_slots = 2, w.f.num_pages = 4;
       w.f.page_size = 10, w.f.k.batch_stride = 320, w.f.v.batch_stride = 160;
     },
     "page_table = given: must be NULL"},
    {"batch index", [](World &w) { w.f.kv_batch_index = w.index.data(); }, "kv_batch_index = given: must be NULL"},
    {"left padding", [](World &w) { w.f.leftpad_k = w.index.data(); }, "leftpad_k = given: must be NULL"},
    {"output scale", [](World &w) { w.f.output_scale = &w.scale, w.f.out.dtype = FLASHSPARK_FLOAT8_E4M3; },
     "output_scale = given: must be NULL"},
    {"fp8 q", [](World &w) { w.f.q.dtype = w.f.k.dtype = w.f.v.dtype = FLASHSPARK_FLOAT8_E4M3; },
     "q.dtype = ", FLASHSPARK_INVALID_TYPE},
    {"fp8 kv", [](World &w) { w.f.k.dtype = w.f.v.dtype = FLASHSPARK_FLOAT8_E4M3; },
     "k.dtype = ", FLASHSPARK_INVALID_TYPE},
    {"fp8 out", [](World &w) { w.f.out.dtype = FLASHSPARK_FLOAT8_E4M3; }, "out.dtype = float8_e4m3: must be q's",
     FLASHSPARK_INVALID_TYPE},
    {"out type", [](World &w) { w.f.out.dtype = FLASHSPARK_BFLOAT16; }, "out.dtype = bfloat16: must be q's",
     FLASHSPARK_INVALID_TYPE},
    {"out is q",
     [](World &w) {
       w.f.head_dim_v = 16, w.f.v = w.f.k, w.f.out = w.f.q;
       w.p.dv = w.p.dk, w.p.dout = w.f.q;
     },
     "out.data = q.data: must not be q"},
    {"no lse", [](World &w) { w.f.lse = nullptr; }, "lse = NULL: must be what the forward call gave"},
    {"no dout", [](World &w) { w.p.dout.data = nullptr; }, "dout.data = NULL: "},
    {"dout type", [](World &w) { w.p.dout.dtype = FLASHSPARK_FLOAT16; }, "dout.dtype = float16: must be q's: float32",
     FLASHSPARK_INVALID_TYPE},
    {"dout stride", [](World &w) { w.p.dout.token_stride = kBig; }, "dout.token_stride = "},
    {"dout aligned", [](World &w) { w.p.dout.data = misaligned(w.dout.data()); }, "dout.data = "},
    {"dq type", [](World &w) { w.p.dq.dtype = FLASHSPARK_BFLOAT16; }, "dq.dtype = bfloat16: must be q's: float32",
     FLASHSPARK_INVALID_TYPE},
    {"dk type", [](World &w) { w.p.dk.dtype = FLASHSPARK_DTYPE_NONE; }, "dk.dtype = none: must be q's",
     FLASHSPARK_INVALID_TYPE},
    {"dv type", [](World &w) { w.p.dv.dtype = FLASHSPARK_FLOAT8_E4M3; }, "dv.dtype = float8_e4m3: must be q's",
     FLASHSPARK_INVALID_TYPE},
    {"dq aligned", [](World &w) { w.p.dq.data = misaligned(w.dq.data()); }, "dq.data = "},
    {"dq rows", [](World &w) { w.p.dq.head_stride = 15; }, "dq.head_stride = 15: rows overlap"},
    {"dk rows", [](World &w) { w.p.dk.token_stride = 0; }, "dk.token_stride = 0: rows overlap"},
    {"dv rows", [](World &w) { w.p.dv.batch_stride = 300; }, "dv.batch_stride = 300: rows overlap"},
    {"dk stride", [](World &w) { w.p.dk.batch_stride = -kBig; }, "dk.batch_stride = "},
    {"dlse aligned", [](World &w) { w.p.dlse = misaligned(w.dlse.data()); }, "dlse.data = "},
    {"dsinks without", [](World &w) { w.f.sinks = nullptr; }, "dsinks = given: must be NULL without sinks"},
    {"dsinks aligned", [](World &w) { w.p.dsinks = misaligned(w.dsinks.data()); }, "dsinks = misaligned: "},
    {"drel without", [](World &w) { w.f.rel_logits = nullptr; },
     "drel_logits = given: must be NULL without rel_logits"},
    {"drel aligned", [](World &w) { w.p.drel_logits = misaligned(w.drel.data()); }, "drel_logits = misaligned: "},
    {"drel rows", [](World &w) { w.f.rel_token_stride = 0; }, "drel_logits.token_stride = 0: rows overlap"},
    {"dalibi without", [](World &w) { w.f.alibi_slopes = nullptr; },
     "dalibi_slopes = given: must be NULL without alibi_slopes"},
    {"dalibi aligned", [](World &w) { w.p.dalibi_slopes = misaligned(w.dalibi.data()); },
     "dalibi_slopes = misaligned: "},
    {"dtensors without", [](World &w) { w.f.score_mod.mod = nullptr; },
     "dtensors = given: must be NULL without score_mod"},
    {"dtensors integer", [](World &w) { w.dtensors[1] = {w.dbias.data() + 7, {1}}; },
     "dtensors[1].data = given: must be NULL: a tensor of i32 has no gradient"},
    {"dtensors aligned", [](World &w) { w.dtensors[0].data = misaligned(w.dbias.data()); },
     "dtensors[0].data = misaligned: "},
    {"dtensors elements", [](World &w) { w.dtensors[0].strides[0] = 0; },
     "dtensors[0].strides[0] = 0: elements overlap: must be at least 1"},
    {"dtensors stride", [](World &w) { w.dtensors[0].strides[0] = kBig; }, "dtensors[0].strides[0] = "},
    {"keys of another sequence",
     [](World &w) {
       w.varlen();
       w.used_k = {21, 12}, w.f.seqused_k = w.used_k.data();
     },
     "seqused_k[0] = 21: must be at most the sequence's keys, 20"},
    // Gradients lie apart from each other and from all that is read.
    {"dq in q", [](World &w) { w.p.dq.data = w.q.data(); }, "dq = ["},
    {"dq in out", [](World &w) { w.p.dq.data = w.out.data(); }, "dq = ["},
    {"dk in k", [](World &w) { w.p.dk.data = w.k.data(); }, "dk = ["},
    {"dk in dv", [](World &w) { w.p.dv.data = w.dk.data(); }, "dk = ["},
    {"dv in dout", [](World &w) { w.p.dv.data = w.dout.data(); }, "dv = ["},
    {"dv in v", [](World &w) { w.p.dv.data = w.v.data(); }, "dv = ["},
    {"dq in lse", [](World &w) { w.p.dq.data = w.lse.data(); }, "dq = ["},
    {"dsinks in dlse", [](World &w) { w.p.dsinks = w.dlse.data() + 3; }, "dsinks = ["},
    {"dsinks in sinks", [](World &w) { w.p.dsinks = w.sinks.data(); }, "dsinks = ["},
    {"drel in rel", [](World &w) { w.p.drel_logits = w.rel.data(); }, "drel_logits = ["},
    {"drel in dq", [](World &w) { w.p.drel_logits = w.dq.data(); }, "dq = ["},
    {"dalibi in alibi", [](World &w) { w.p.dalibi_slopes = w.alibi.data(); }, "dalibi_slopes = ["},
    {"dalibi in dsinks", [](World &w) { w.p.dsinks = w.dalibi.data() + 5; }, "dsinks = ["},
    {"dtensors in captured", [](World &w) { w.dtensors[0] = {w.bias.data(), {1}}; }, "dtensors = ["},
    {"dtensors in indices", [](World &w) { w.dtensors[0] = {reinterpret_cast<float *>(w.shift.data()), {1}}; },
     "dtensors = ["},
    {"dtensors backwards in dk", [](World &w) { w.dtensors[0] = {w.dk.data() + w.dk.size() + 2, {-1}}; }, "dk = ["},
};

class BackwardValidator : public testing::TestWithParam<Fault> {};

TEST_P(BackwardValidator, NamesTheArgumentAndWritesNothing) {
  const Fault &fault = GetParam();
  World w;
  fault.plant(w);
  size_t size = 123;
  char text[64] = "x";
  const auto check = [&](flashspark_status status, const char *call) {
    EXPECT_EQ(status, fault.status) << call << ": " << flashspark_last_error();
    EXPECT_EQ(std::string(flashspark_last_error()).rfind(fault.message, 0), 0u)
        << call << ": " << flashspark_last_error();
    EXPECT_TRUE(w.untouched()) << call;
  };
  check(flashspark_attention_backward(&w.p), "backward");
  check(flashspark_attention_backward_explain(&w.p, text, sizeof text), "explain");
  check(flashspark_attention_backward_workspace_size(&w.p, &size), "workspace_size");
  check(flashspark_attention_backward_validate(&w.p), "validate");
}

INSTANTIATE_TEST_SUITE_P(Faults, BackwardValidator, testing::ValuesIn(kFaults), [](const auto &info) {
  std::string name = info.param.name;
  std::erase(name, ' ');
  return name;
});

// The world that the faults are planted in is legal, or the table would prove nothing; so are its neighbours.
TEST(BackwardProblems, AreAcceptedUnbroken) {
  const std::vector<std::function<void(World &)>> worlds = {
      [](World &) {},
      &World::varlen,
      [](World &w) {
        w.varlen();
        w.f.seqused_k = w.used_k.data();
      },
      [](World &w) { w.p.dq.data = w.p.dk.data = w.p.dv.data = nullptr; },
      [](World &w) { w.p.dlse = w.p.dsinks = w.p.drel_logits = w.p.dalibi_slopes = nullptr, w.p.dtensors = nullptr; },
      [](World &w) { w.dtensors[0] = {w.dbias.data() + 6, {-2}}; },
      [](World &w) { w.p.dout.batch_stride = w.p.dout.token_stride = w.p.dout.head_stride = 0; },
      [](World &w) { w.f.deterministic = 1; }};
  for (size_t n = 0; n < worlds.size(); ++n) {
    World w;
    worlds[n](w);
    EXPECT_EQ(flashspark_attention_backward_validate(&w.p), FLASHSPARK_OK) << n << ": " << flashspark_last_error();
    EXPECT_TRUE(w.untouched());
    EXPECT_EQ(flashspark_attention_backward(&w.p), FLASHSPARK_OK) << n << ": " << flashspark_last_error();
    const auto written = [](const std::vector<float> &gradient) {
      for (const float x : gradient) {
        if (!std::isfinite(x)) return false;
      }
      return true;
    };
    EXPECT_EQ(written(w.dq) && written(w.dk), w.p.dq.data != nullptr) << n;
    EXPECT_EQ(written(w.dsinks) && written(w.drel) && written(w.dalibi), w.p.dsinks != nullptr) << n;
  }
}

TEST(BackwardProblems, MayBeEmpty) {
  const std::vector<std::function<void(World &)>> empties = {
      [](World &w) {
        w.f.num_seqs = 0;
        w.f.lse = nullptr, w.p.dout.data = nullptr;
      },
      [](World &w) {
        w.f.max_seqlen_q = 0;
        w.f.q.data = w.f.out.data = w.p.dout.data = w.p.dq.data = nullptr, w.f.lse = nullptr;
      },
      [](World &w) {
        w.f.max_seqlen_k = 0;
        w.f.k.data = w.f.v.data = w.p.dk.data = w.p.dv.data = nullptr;
      }};
  for (size_t n = 0; n < empties.size(); ++n) {
    World w;
    empties[n](w);
    EXPECT_EQ(flashspark_attention_backward(&w.p), FLASHSPARK_OK) << n << ": " << flashspark_last_error();
  }
  World w;  // keys that no token sees have gradients, too
  empties[1](w);
  EXPECT_EQ(flashspark_attention_backward(&w.p), FLASHSPARK_OK) << flashspark_last_error();
  for (const std::vector<float> *gradient : {&w.dk, &w.dv, &w.dsinks, &w.dalibi}) {
    for (const float x : *gradient) EXPECT_EQ(x, 0);
  }
}

}  // namespace
}  // namespace flashspark
