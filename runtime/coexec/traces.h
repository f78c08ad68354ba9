// Memoised operators and the graph of the paths that they were called along.
#pragma once
#include <algorithm>
#include <map>

#include "operators.h"

namespace regraft {

struct OutSpec {
  uint32_t meta = 0;
  int32_t alias = -1;  // the result is this tensor argument (counted through lists)
  bool undefined = false, grad = false;
};

// An operator with everything but data that its results' metadata depend on.
struct Memo {
  c10::OperatorHandle op;
  const OpInfo* info;
  bool barrier = false;       // learned: cannot be put off
  std::vector<int> returns;   // a result each: -1 a tensor, else the length of a list
  std::vector<OutSpec> outs;  // flat
};

// For whoever looks at the graph.
struct Remark {
  std::string line;                      // of the program, where paths part before this node
  std::map<std::string, int64_t> waits;  // Python waited after this node: line and count
};

struct GradSpec {
  int32_t leaf;
  bool fresh;  // .grad was None before
  uint32_t meta;
};

// What a backward pass did to the leaves, for one path and its roots.
struct BackwardSpec {
  std::vector<GradSpec> grads;
};

struct Stretch;

struct TraceNode {
  const Memo* memo = nullptr;  // null: the root or a backward pass
  std::vector<int32_t> wiring;
  TraceNode* parent = nullptr;
  TraceNode* last = nullptr;
  uint64_t visits = 0, ends = 0;
  bool backward_known = false;
  BackwardSpec backward;
  std::shared_ptr<Stretch> stretch;  // of operators put off together, ending here
  std::shared_ptr<Stretch> foreseen;  // may be begun here, with this piece of it
  uint32_t piece = 0;
  std::vector<std::unique_ptr<TraceNode>> children;
  std::unique_ptr<Remark> remark;

  Remark& remarks() {
    if (!remark) remark = std::make_unique<Remark>();
    return *remark;
  }
};

// Traces merged by their common beginnings: a node is one operator, the tensors it was given by
// number, and all that went before it.
class TraceGraph {
 public:
  static constexpr size_t LARGEST = 50000;

  TraceNode* root() { return &root_; }
  const TraceNode* root() const { return &root_; }
  TraceNode& here() { return *here_; }  // the node stepped to last

  // The node after `from`; null where the graph is full.
  TraceNode* step(TraceNode* from, const Memo* memo, const std::vector<int32_t>& wiring) {
    auto* next = from->last;
    if (!next || next->memo != memo || next->wiring != wiring) {
      next = nullptr;
      for (auto& child : from->children)
        if (child->memo == memo && child->wiring == wiring) next = child.get();
    }
    if (!next) {
      if (size_ >= LARGEST) return nullptr;
      auto made = std::make_unique<TraceNode>();
      made->memo = memo, made->wiring = wiring, made->parent = from;
      next = made.get(), ++size_;
      from->children.push_back(std::move(made));
    }
    from->last = here_ = next, ++next->visits;
    return next;
  }

  size_t size() const { return size_; }

  // Nodes that a path ended at, with their depth.
  std::vector<std::pair<const TraceNode*, size_t>> ends() const {
    std::vector<std::pair<const TraceNode*, size_t>> found, todo{{&root_, 0}};
    while (!todo.empty()) {
      auto [node, depth] = todo.back();
      todo.pop_back();
      if (node->ends) found.emplace_back(node, depth);
      for (const auto& child : node->children) todo.emplace_back(child.get(), depth + 1);
    }
    return found;
  }

  ~TraceGraph() {  // children of deep graphs are not freed by recursion
    std::vector<std::unique_ptr<TraceNode>> todo;
    std::move(root_.children.begin(), root_.children.end(), std::back_inserter(todo));
    while (!todo.empty()) {
      auto node = std::move(todo.back());
      todo.pop_back();
      std::move(node->children.begin(), node->children.end(), std::back_inserter(todo));
    }
  }

 private:
  TraceNode root_, *here_ = &root_;
  size_t size_ = 0;
};

}  // namespace regraft
