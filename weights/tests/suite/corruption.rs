//! Damage at random: a folder is read or refused, without a panic, a hang or a great allocation.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

use burn::backend::Flex;
use burn::tensor::DType;
use long_context_weights::{Checkpoint, Tokenizer};

use crate::support::{CONFIG, Chance, Folder, INDEX, MODEL, SHARD, Safetensors, fixture};
use crate::torch;

/// Far above what these small files need, far below what their headers could ask for.
const MOST_BYTES: usize = 64 << 20;
const MOST_TIME: Duration = Duration::from_secs(20);
const SEED: u64 = 20_240_517;

/// The system's allocator, watched: the largest request of each thread is kept.
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn watch(bytes: usize) {
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(bytes)));
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        watch(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        watch(bytes);
        // SAFETY: as above.
        unsafe { System.realloc(block, layout, bytes) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Changes the part of `bytes` that ends at `end`: flips, numbers in place of others, cuts, repeats.
fn damaged(bytes: &[u8], end: usize, chance: &mut Chance) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..=chance.below(3) {
        let end = end.min(bytes.len());
        if end == 0 {
            return bytes;
        }
        let at = chance.below(end);
        match chance.below(8) {
            0 => bytes.truncate(at),
            1 => drop(bytes.remove(at)),
            2 => bytes.insert(at, *chance.pick(b"0987654321{}[],:\"-.e\\")),
            3 => {
                let length = chance.below(16).min(end - at);
                let part = bytes[at..at + length].to_vec();
                bytes.splice(at..at, part);
            }
            4 | 5 => {
                // Another digit in a number that is there.
                let digit = (at..end).find(|&i| bytes[i].is_ascii_digit()).unwrap_or(at);
                bytes[digit] = *chance.pick(b"0123456789");
            }
            6 => bytes[at] = chance.next() as u8,
            _ => bytes[at] ^= 1 << chance.below(8),
        }
    }
    bytes
}

/// Damages `name` again and again, `end` of it, and uses the folder each time.
fn survives(folder: &Folder, name: &str, end: usize, rounds: u64, read: impl FnMut(&Folder) -> bool) {
    survives_within(MOST_BYTES, folder, name, end, rounds, read);
}

fn survives_within(
    most: usize,
    folder: &Folder,
    name: &str,
    end: usize,
    rounds: u64,
    mut read: impl FnMut(&Folder) -> bool,
) {
    let whole = folder.read(name);
    assert!(read(folder), "{name} as it was");
    let (start, mut refused) = (Instant::now(), 0);
    for round in 0..rounds {
        let mut chance = Chance::new(SEED + round);
        folder.write(name, &damaged(&whole, end, &mut chance));
        LARGEST.set(0);
        let result = catch_unwind(AssertUnwindSafe(|| read(folder)));
        let (largest, what) = (LARGEST.get(), format!("{name}, seed {}", SEED + round));
        assert!(largest < most, "{what}: {largest} bytes at once");
        assert!(start.elapsed() < MOST_TIME, "{what}: {:?} up to here", start.elapsed());
        refused += u64::from(!result.unwrap_or_else(|_| panic!("{what}: a panic")));
    }
    assert!(refused > rounds / 4, "{name}: {refused} of {rounds} refused from seed {SEED} on");
}

/// Whether the folder is opened and loaded; what is said of it otherwise is one line.
fn loads(folder: &Folder) -> bool {
    let result = Checkpoint::open(folder.path()).and_then(|checkpoint| {
        checkpoint.load::<Flex>(checkpoint.config(), DType::F32, &Default::default(), Rc::new(|_| ()))
    });
    result.inspect_err(|error| drop(folder.relative(error))).is_ok()
}

#[test]
fn damaged_headers_are_survived() {
    for golden in ["internlm2-tiny", "chatglm2-tiny"] {
        let folder = Folder::golden(golden);
        let bytes = folder.read(MODEL);
        let header = bytes.len() - Safetensors::parse(&bytes).data.len();
        survives(&folder, MODEL, header, 300, loads);
        // The stated length of the header alone.
        survives(&Folder::golden(golden), MODEL, 8, 100, loads);
    }
}

#[test]
fn damaged_shards_are_survived() {
    let folder = Folder::golden("internlm2-tiny-sharded");
    let bytes = folder.read(SHARD);
    survives(&folder, SHARD, bytes.len() - Safetensors::parse(&bytes).data.len(), 200, loads);
}

#[test]
fn damaged_indices_are_survived() {
    let folder = Folder::golden("internlm2-tiny-sharded");
    survives(&folder, INDEX, usize::MAX, 400, loads);
}

#[test]
fn damaged_configs_are_survived() {
    for golden in ["internlm2-ntk-tiny", "chatglm2-32k-tiny", "glm4-tiny"] {
        survives(&Folder::golden(golden), CONFIG, usize::MAX, 300, loads);
    }
}

#[test]
fn damaged_pytorch_files_are_survived() {
    const FILE: &str = "pytorch_model.bin";
    let folder = Folder::golden("internlm2-tiny");
    let tensors = Safetensors::parse(&folder.read(MODEL)).tensors();
    folder.remove(MODEL);
    let (entries, whole) = (torch::entries(&tensors), torch::save(&tensors));
    folder.write(FILE, &whole);
    // The pickle lies first, the directory of the archive last.
    survives(&folder, FILE, entries[0].1.len() + 64, 300, loads);
    folder.write(FILE, &whole);
    survives(&folder, FILE, usize::MAX, 200, loads);
}

#[test]
fn damaged_pickles_with_a_right_checksum_are_survived() {
    const FILE: &str = "pytorch_model.bin";
    let folder = Folder::golden("internlm2-tiny");
    let tensors = Safetensors::parse(&folder.read(MODEL)).tensors();
    folder.remove(MODEL);
    let entries = torch::entries(&tensors);
    folder.write("pickle", &entries[0].1);
    // The length of a string is four bytes, and the reader asks for as much, zeroed, before it looks.
    survives_within(1 << 32, &folder, "pickle", usize::MAX, 300, |folder| {
        let mut entries = entries.clone();
        entries[0].1 = folder.read("pickle");
        folder.write(FILE, &torch::zip(&entries));
        loads(folder)
    });
}

#[test]
fn damaged_tokenizers_are_survived() {
    for (kind, name) in
        [("sentencepiece", "tokenizer.model"), ("tiktoken", "tokenizer.model"), ("json", "tokenizer.json")]
    {
        let folder = Folder::empty();
        folder.write(name, &std::fs::read(fixture("tokenizer").join(kind).join(name)).unwrap());
        let whole = folder.read(name);
        for round in 0..100 {
            let mut chance = Chance::new(SEED + round);
            folder.write(name, &damaged(&whole, usize::MAX, &mut chance));
            LARGEST.set(0);
            let result = catch_unwind(AssertUnwindSafe(|| match Tokenizer::from_dir(folder.path()) {
                Ok(tokenizer) => drop(tokenizer.decode(&tokenizer.encode("Any text, 任何文字 🙂"))),
                Err(error) => drop(folder.relative(&error)),
            }));
            assert!(result.is_ok(), "{kind}, seed {}: a panic", SEED + round);
            assert!(LARGEST.get() < MOST_BYTES, "{kind}, seed {}: {} bytes", SEED + round, LARGEST.get());
        }
    }
}
