//! The header of a safetensors file, checked to the last byte.
//!
//! The `safetensors` crate checks the same; here every complaint names the tensor.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use burn::tensor::DType;
use serde_json::Value;

use crate::error::{Error, Result};

/// Longer headers are refused, as the format's own library does.
const MOST_HEADER_BYTES: u64 = 100_000_000;

/// Where a tensor lies and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub dtype: DType,
    pub shape: Vec<usize>,
    /// Bytes of the file.
    pub range: Range<usize>,
}

/// Reads the header of `bytes`, the whole file: every range lies inside, none overlap, nothing is left over.
pub(crate) fn read(file: &Path, bytes: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let header = |found: String, expected: &str| Error::invalid(file, "header", found, expected);
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(header(format!("a file of {} bytes", bytes.len()), "at least 8"));
    };
    let length = u64::from_le_bytes(*length);
    if length > MOST_HEADER_BYTES || length > rest.len() as u64 {
        let most = MOST_HEADER_BYTES.min(rest.len() as u64);
        return Err(header(format!("a length of {length} bytes"), &format!("at most {most}")));
    }
    let (text, data) = rest.split_at(length as usize);
    let json: serde_json::Map<String, Value> = serde_json::from_slice(text)
        .map_err(|error| header(error.to_string(), "a JSON object with one entry a tensor"))?;

    let start = bytes.len() - data.len();
    let mut entries = BTreeMap::new();
    for (name, value) in &json {
        if name != "__metadata__" {
            entries.insert(name.clone(), entry(file, name, value, start, data.len())?);
        }
    }
    check_cover(file, &entries, start, bytes.len())?;
    Ok(entries)
}

fn entry(file: &Path, name: &str, value: &Value, start: usize, data: usize) -> Result<Entry> {
    let number = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
    let numbers = |key: &str| -> Result<Vec<usize>> {
        let found = &value[key];
        let list = found.as_array().and_then(|list| list.iter().map(number).collect());
        list.ok_or_else(|| {
            Error::tensor(file, name, format_args!("{key} {found}"), "a list of whole numbers")
        })
    };
    let dtype = match value["dtype"].as_str() {
        Some("F32") => DType::F32,
        Some("F16") => DType::F16,
        Some("BF16") => DType::BF16,
        _ => {
            return Err(Error::tensor(
                file,
                name,
                format_args!("dtype {}", value["dtype"]),
                "F32, F16 or BF16",
            ));
        }
    };
    let shape = numbers("shape")?;
    let offsets = numbers("data_offsets")?;
    let &[first, last] = offsets.as_slice() else {
        return Err(Error::tensor(file, name, format_args!("data_offsets {offsets:?}"), "two numbers"));
    };
    if first > last || last > data {
        let expected = format!("a range inside the {data} bytes of data");
        return Err(Error::tensor(file, name, format_args!("bytes {first}..{last}"), expected));
    }
    let bytes = shape.iter().try_fold(dtype.size(), |product, &n| product.checked_mul(n));
    if bytes != Some(last - first) {
        let expected = bytes.map_or("a size that can be addressed".to_string(), |bytes| format!("{bytes}"));
        let found = format!("{} bytes for {dtype:?} {shape:?}", last - first);
        return Err(Error::tensor(file, name, found, expected));
    }
    Ok(Entry { dtype, shape, range: start + first..start + last })
}

fn check_cover(file: &Path, entries: &BTreeMap<String, Entry>, start: usize, end: usize) -> Result<()> {
    let mut ranges: Vec<_> = entries.iter().map(|(name, entry)| (&entry.range, name)).collect();
    ranges.sort_by_key(|(range, _)| (range.start, range.end));
    let mut reached = start;
    for (range, name) in ranges {
        if range.start != reached {
            let found = format!("data from byte {}", range.start - start);
            return Err(Error::tensor(
                file,
                name,
                found,
                format!("{} (no holes, no overlaps)", reached - start),
            ));
        }
        reached = range.end;
    }
    if reached != end {
        let (found, expected) = (end - start, reached - start);
        return Err(Error::invalid(
            file,
            "data",
            format!("{found} bytes"),
            format!("{expected} as its header says"),
        ));
    }
    Ok(())
}
