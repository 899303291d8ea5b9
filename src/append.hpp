#pragma once
#include "problem.hpp"

namespace flashspark {

// One sequence's part of an append: its new rows, and its rows of q in use.
struct AppendSequence {
  int64_t b;
  int64_t rows, new_row;  // new rows, and the first of them in k_new and v_new
  int64_t q_rows, q_row;  // the same of q; 0 without q
  int64_t before;         // keys in the cache before
  int64_t cache_index;    // sequence of a dense cache, or row of page_table
  int64_t position0;      // by which row 0 turns
};

AppendSequence append_sequence(const AppendParams &p, int64_t b);

// Writes the new rows (validated params, CPU memory).
void append_kv(const AppendParams &p);

}  // namespace flashspark
