// Tensors that are looked at before every step: where each lies, in what shape, torch's count of writes to it, and a word of
// its memory.
//
// A step streams all weights through the caches, so that nothing that a look reads is there: `ask_for` requests all of it
// at once, where one reading after the other would wait for each. It is given addresses and follows none that may be gone.
#include <ATen/core/Tensor.h>
#include <torch/custom_class.h>

#include <algorithm>

namespace toolkit::tensor_watch {

using at::Tensor;

constexpr int64_t kLine = 64;

// The lines of `bytes` from an address on, which need not be mapped.
inline void ask_for(const void* address, int64_t bytes = kLine) {
  const char* const p = static_cast<const char*>(address);
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(p + at, 0, 2);
}

class TensorWatch : public torch::CustomClassHolder {
 public:
  // `words`: of each tensor the address of four bytes of its memory, or 0.
  TensorWatch(const std::vector<Tensor>& tensors, const std::vector<int64_t>& words) {
    TORCH_CHECK(words.size() == tensors.size(), "TensorWatch: words must be one address per tensor, got ", words.size(),
                " for ", tensors.size(), " tensors.");
    for (size_t i = 0; i < tensors.size(); ++i) {
      auto* const impl = tensors[i].unsafeGetTensorImpl();
      const auto& storage = impl->unsafe_storage();
      const auto* const word = reinterpret_cast<const int32_t*>(words[i]);
      seen_.push_back({impl, storage.unsafeGetStorageImpl(), storage.getWeakStorageImpl(), data_of(*impl),
                       impl->storage_offset(), version_of(*impl), word, word == nullptr ? 0 : *word, shapes_.size()});
      append_shape(*impl);
    }
  }

  // Requests what `look` will read.
  void ask_for_all() const {
    for (const Seen& one : seen_) {
      ask_for(one.impl, sizeof(c10::TensorImpl));
      ask_for(one.storage, sizeof(c10::StorageImpl));
      ask_for(one.word);
    }
  }

  // Indices of the tensors that were written since the last look. {-1} where one is another tensor or has other memory,
  // shape or strides: then nothing was looked at.
  std::vector<int64_t> look(const std::vector<Tensor>& tensors) {
    if (tensors.size() != seen_.size()) return {-1};
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (tensors[i].unsafeGetTensorImpl() != seen_[i].impl) return {-1};
      // A counter is an object apart.
      ask_for(*reinterpret_cast<const void* const*>(&seen_[i].impl->version_counter()));
    }
    for (const Seen& one : seen_)
      if (one.impl->unsafe_storage().unsafeGetStorageImpl() != one.storage ||
          (one.storage != nullptr && one.kept.expired()) || data_of(*one.impl) != one.data ||
          one.impl->storage_offset() != one.offset || !has_shape(one))
        return {-1};
    std::vector<int64_t> written;
    for (size_t i = 0; i < seen_.size(); ++i) {
      Seen& one = seen_[i];
      const int64_t version = version_of(*one.impl);
      const int32_t sample = one.word == nullptr ? 0 : *one.word;
      if (version == one.version && sample == one.sample) continue;
      one.version = version;
      one.sample = sample;
      written.push_back(static_cast<int64_t>(i));
    }
    return written;
  }

  // Of each tensor torch's count of writes and the word, at the last look.
  std::vector<std::vector<int64_t>> stamps() const {
    std::vector<std::vector<int64_t>> found;
    for (const Seen& one : seen_) found.push_back({one.version, one.sample});
    return found;
  }

 private:
  struct Seen {
    c10::TensorImpl* impl;  // compared with that of a tensor that lives before it is followed
    c10::StorageImpl* storage;
    c10::weak_intrusive_ptr<c10::StorageImpl> kept;  // so that no other storage comes to lie there
    const void* data;
    int64_t offset, version;
    const int32_t* word;
    int32_t sample;
    size_t shape;  // where in `shapes_` its sizes and strides begin
  };

  static const void* data_of(c10::TensorImpl& impl) {
    c10::StorageImpl* const storage = impl.unsafe_storage().unsafeGetStorageImpl();  // null of a wrapper
    return storage == nullptr ? nullptr : storage->_mutable_data_ptr_no_checks().get();
  }
  static int64_t version_of(c10::TensorImpl& impl) {
    return impl.is_inference() ? -1 : impl.version_counter().current_version();
  }

  void append_shape(const c10::TensorImpl& impl) {
    shapes_.push_back(impl.dim());
    shapes_.insert(shapes_.end(), impl.sizes().begin(), impl.sizes().end());
    shapes_.insert(shapes_.end(), impl.strides().begin(), impl.strides().end());
  }
  bool has_shape(const Seen& one) const {
    const int64_t* const shape = shapes_.data() + one.shape;
    const auto sizes = one.impl->sizes(), strides = one.impl->strides();
    const int64_t dim = *shape;
    return int64_t(sizes.size()) == dim && std::equal(sizes.begin(), sizes.end(), shape + 1) &&
           std::equal(strides.begin(), strides.end(), shape + 1 + dim);
  }

  std::vector<Seen> seen_;
  std::vector<int64_t> shapes_;
};

// Memory of objects that is requested at once, before a look at them.
//
// `kept`: addresses of objects that the owner of this keeps alive, each of `words` pointers or numbers: what they may point
// to is requested too, `bytes` of each. `others`: addresses of what may be gone.
class MemoryHints : public torch::CustomClassHolder {
 public:
  MemoryHints(std::vector<int64_t> kept, int64_t words, int64_t bytes, std::vector<int64_t> others)
      : kept_(std::move(kept)), others_(std::move(others)), words_(words), bytes_(bytes) {}

  void ask_for_all() const {
    for (const int64_t address : kept_) ask_for(reinterpret_cast<const void*>(address), words_ * int64_t(sizeof(void*)));
    for (const int64_t address : others_) ask_for(reinterpret_cast<const void*>(address));
    for (const int64_t address : kept_) {
      const auto* const object = reinterpret_cast<const int64_t*>(address);
      for (int64_t i = 2; i < words_; ++i)  // behind the count of references and the type
        if (object[i] > kLeastAddress && object[i] % 8 == 0) ask_for(reinterpret_cast<const void*>(object[i]), bytes_);
    }
  }

 private:
  static constexpr int64_t kLeastAddress = 1 << 20;
  std::vector<int64_t> kept_, others_;
  int64_t words_, bytes_;
};

TORCH_LIBRARY_FRAGMENT(toolkit_native, m) {
  m.class_<TensorWatch>("TensorWatch")
      .def(torch::init<std::vector<Tensor>, std::vector<int64_t>>())
      .def("ask_for_all", &TensorWatch::ask_for_all)
      .def("look", &TensorWatch::look)
      .def("stamps", &TensorWatch::stamps);
  m.class_<MemoryHints>("MemoryHints")
      .def(torch::init<std::vector<int64_t>, int64_t, int64_t, std::vector<int64_t>>())
      .def("ask_for_all", &MemoryHints::ask_for_all);
}

}  // namespace toolkit::tensor_watch
