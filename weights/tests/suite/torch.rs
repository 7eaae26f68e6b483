//! Files as `torch.save` writes them: a zip archive of a pickled state dict and its storages.

use crate::support::Stored;

/// The entries of an archive.
pub type Entries = Vec<(String, Vec<u8>)>;

/// The entries that `torch.save` makes of a state dict, one storage a tensor.
pub fn entries(tensors: &[Stored]) -> Entries {
    let mut entries =
        vec![("archive/data.pkl".to_string(), pickle(tensors)), text("archive/byteorder", "little")];
    for (key, tensor) in tensors.iter().enumerate() {
        entries.push((format!("archive/data/{key}"), tensor.data.clone()));
    }
    entries.push(text("archive/version", "3\n"));
    entries
}

/// The bytes of a whole file.
pub fn save(tensors: &[Stored]) -> Vec<u8> {
    zip(&entries(tensors))
}

fn text(name: &str, content: &str) -> (String, Vec<u8>) {
    (name.to_string(), content.as_bytes().to_vec())
}

fn pickle(tensors: &[Stored]) -> Vec<u8> {
    let mut out = vec![0x80, 2, b'}', b'('];
    for (key, tensor) in tensors.iter().enumerate() {
        let storage = match tensor.dtype.as_str() {
            "F32" => "FloatStorage",
            "F16" => "HalfStorage",
            "BF16" => "BFloat16Storage",
            "F64" => "DoubleStorage",
            other => panic!("{other} has no storage here"),
        };
        string(&mut out, &tensor.name);
        global(&mut out, "torch._utils", "_rebuild_tensor_v2");
        out.extend(b"((");
        string(&mut out, "storage");
        global(&mut out, "torch", storage);
        string(&mut out, &key.to_string());
        string(&mut out, "cpu");
        int(&mut out, tensor.shape.iter().product());
        out.extend(b"tQ");
        int(&mut out, 0);
        let strides = (0..tensor.shape.len()).map(|i| tensor.shape[i + 1..].iter().product()).collect();
        for numbers in [tensor.shape.clone(), strides] {
            out.push(b'(');
            numbers.into_iter().for_each(|number| int(&mut out, number));
            out.push(b't');
        }
        out.push(0x89);
        global(&mut out, "collections", "OrderedDict");
        out.extend(b")RtR");
    }
    out.extend(b"u.");
    out
}

fn string(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn global(out: &mut Vec<u8>, module: &str, name: &str) {
    out.extend(format!("c{module}\n{name}\n").as_bytes());
}

fn int(out: &mut Vec<u8>, number: usize) {
    out.push(b'J');
    out.extend((number as i32).to_le_bytes());
}

/// An archive whose entries are stored as they are.
pub fn zip(entries: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in entries {
        let offset = out.len() as u32;
        // Version, flags, method, time, date; checksum and sizes; lengths of the name and of extra fields.
        let mut common = Vec::new();
        [20u16, 0, 0, 0, 33].iter().for_each(|word| common.extend(word.to_le_bytes()));
        [checksum(data), data.len() as u32, data.len() as u32]
            .iter()
            .for_each(|word| common.extend(word.to_le_bytes()));
        [name.len() as u16, 0].iter().for_each(|word| common.extend(word.to_le_bytes()));
        out.extend([b"PK\x03\x04".as_slice(), &common, name.as_bytes(), data].concat());
        directory.extend([b"PK\x01\x02".as_slice(), &20u16.to_le_bytes(), &common, &[0; 10]].concat());
        directory.extend([&offset.to_le_bytes(), name.as_bytes()].concat());
    }
    let (count, start) = (entries.len() as u16, out.len() as u32);
    let size = directory.len() as u32;
    out.extend(directory);
    out.extend(b"PK\x05\x06");
    [0, 0, count, count].iter().for_each(|word| out.extend(word.to_le_bytes()));
    [size, start].iter().for_each(|word| out.extend(word.to_le_bytes()));
    out.extend([0, 0]);
    out
}

fn checksum(data: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}
