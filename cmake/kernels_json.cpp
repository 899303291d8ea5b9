// Prints kernels.json: every kernel of kernels.def and instances.def, one line each, with all that a build, a test
// or a tool has to know of it. Needs the headers in kernels/ and src/ alone.
#include <cstdio>
#include <stdexcept>

#include "backward/smem_plan.hpp"
#include "cuda/kernel_key.hpp"
#include "forward/smem_plan.hpp"

namespace flashspark::cuda {
namespace {

template <size_t n>
const char *name_in(const char *const (&names)[n], auto value) {
  if (static_cast<size_t>(value) >= n) throw std::logic_error("kernels_json.cpp: an enumerator without a name");
  return names[static_cast<size_t>(value)];
}
constexpr const char *kTilings[] = {"prefill", "short_q", "decode"};
constexpr const char *kScoreMods[] = {"none", "native", "dropout"};
constexpr const char *kBufferings[] = {"single_buffer", "double_buffer"};
constexpr const char *kSharings[] = {"none", "gradients", "columns"};
constexpr const char *kRowStages[] = {"one", "queries", "all", "steps"};
constexpr const char *kQueries[] = {"shared", "registers", "shared_dedicated"};

// As the sources spell the types (element.hpp).
constexpr const char *kElementMacros[] = {"", R"(, "FLASHSPARK_ELEMENT=Bfloat16")", R"(, "FLASHSPARK_ELEMENT=Float16")",
                                          R"(, "FLASHSPARK_ELEMENT=Float16", "FLASHSPARK_ELEMENT_KV=E4m3")"};

void print_launch(const char *arch, const KernelKey &key, const Tile *tile) {
  const OperationTraits &traits = traits_of(key.operation);
  if (tile == nullptr) {
    std::printf(", \"%s\": {\"threads\": %u, \"min_ctas\": %u, \"shared_bytes\": %u", arch, traits.threads,
                traits.min_ctas, traits.shared_bytes);
  } else {
    std::printf(", \"%s\": {\"threads\": %d, \"min_ctas\": %d, \"shared_bytes\": %d", arch, tile->threads(),
                tile->min_ctas, shared_bytes(*key.instance_traits(), *tile, key.dtype == KernelDType::e4m3));
    std::printf(
        ", \"warps\": %d, \"warp_rows\": %d, \"keys\": %d, \"score_keys\": %d, \"key_groups\": %d, "
        "\"buffering\": \"%s\", \"queries\": \"%s\"",
        tile->warps, tile->warp_rows, tile->keys, tile->score_keys, tile->key_groups,
        name_in(kBufferings, tile->buffering), name_in(kQueries, tile->queries));
  }
  std::printf("}");
}

void print_launch(const char *arch, const BackwardInstance &instance, const BackwardTile &tile) {
  const auto place = [](bool in_registers) { return in_registers ? "registers" : "shared"; };
  std::printf(
      ", \"%s\": {\"threads\": %d, \"min_ctas\": %d, \"shared_bytes\": %d, \"warps\": %d, \"warp_keys\": %d, "
      "\"rows\": %d, \"score_rows\": %d, \"k\": \"%s\", \"v\": \"%s\", \"stages\": \"%s\", "
      "\"sharing\": \"%s\"}",
      arch, tile.threads(), tile.min_ctas, shared_bytes(instance, tile), tile.warps, tile.warp_keys, tile.rows,
      tile.score_rows, place(tile.keys_in_registers), place(tile.values_in_registers), name_in(kRowStages, tile.stages),
      name_in(kSharings, tile.sharing));
}

void print(const KernelKey &key) {
  const OperationTraits &traits = traits_of(key.operation);
  const Instance *instance = key.instance_traits();
  const BackwardInstance *backward = key.backward_traits();
  const std::string name = key.name();
  std::printf("{\"name\": \"%s\", \"operation\": \"%s\", \"source\": \"%s\", \"dtype\": \"%s\"", name.c_str(),
              traits.name, traits.source, name_of(key.dtype));
  if (instance != nullptr) {
    std::printf(
        ", \"instance\": \"%s\", \"head_dim\": %d, \"head_dim_v\": %d, \"tiling\": \"%s\", \"score_mod\": \"%s\"",
        instance->name, instance->head_dim, instance->head_dim_v, name_in(kTilings, instance->tiling),
        name_in(kScoreMods, instance->score_mod));
  }
  if (backward != nullptr) {
    std::printf(", \"instance\": \"%s\", \"head_dim\": %d, \"head_dim_v\": %d, \"score_mod\": \"%s\"", backward->name,
                backward->head_dim, backward->head_dim_v, name_in(kScoreMods, backward->score_mod));
  }
  std::printf(", \"macros\": [\"FLASHSPARK_ENTRY=flashspark_%s\"%s", name.c_str(), name_in(kElementMacros, key.dtype));
  if (*key.instance_name() != '\0') std::printf(", \"FLASHSPARK_NAME=%s\"", key.instance_name());
  std::printf("]");
  if (backward != nullptr) {
    print_launch("sm_90", *backward, backward->sm_90);  // sm_80's, too
    print_launch("sm_120f", *backward, backward->sm_120f);
  } else {
    print_launch("sm_90", key, instance != nullptr ? &instance->sm_90 : nullptr);
    print_launch("sm_120f", key, instance != nullptr ? &instance->sm_120f : nullptr);
  }
  std::printf("}");
}

}  // namespace
}  // namespace flashspark::cuda

int main() {
  const char *separator = "[\n";
  for (const flashspark::cuda::KernelKey &key : flashspark::cuda::all_kernels()) {
    std::printf("%s", separator);
    flashspark::cuda::print(key);
    separator = ",\n";
  }
  std::printf("\n]\n");
  return 0;
}
