//! Loads a checkpoint folder with the library and continues a text.
//!
//! `cargo run --release -p long-context-examples --bin load-checkpoint -- FOLDER "Once upon a time"`

use std::error::Error;
use std::ops::ControlFlow;
use std::rc::Rc;

use burn::backend::Flex;
use burn::tensor::DType;
use long_context::cache::AttentionConfig;
use long_context::generate::{Event, GeneratorConfig, generate};
use long_context::sampler::SamplerConfig;
use long_context_weights::{Chat, Checkpoint, StreamDecoder};

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(folder), Some(text)) = (arguments.next(), arguments.next()) else {
        return Err("expected two arguments: a checkpoint folder and a text".into());
    };
    let device = Default::default();
    let checkpoint = Checkpoint::open(folder)?;
    let tokenizer = checkpoint.tokenizer()?;
    let chat = Chat::new(&checkpoint, &tokenizer)?;
    let prompt = [chat.prefix(), tokenizer.encode(&text)].concat();

    let config = checkpoint.config();
    let model = checkpoint.load::<Flex>(config, DType::F32, &device, Rc::new(|_bytes_read| ()))?;
    let limits = GeneratorConfig {
        capacity: prompt.len() + 40,
        chunk: 512,
        dtype: DType::F32,
        attention: AttentionConfig::default(),
    };
    let mut engine = limits.init(model, config, &device);
    let mut sampler = SamplerConfig::default().init()?;
    let mut stream = StreamDecoder::new(&tokenizer);
    print!("{text}");
    generate(&mut engine, &prompt, &mut sampler, 40, chat.stop_ids(), &mut |event| {
        if let Event::Token(id) = event {
            print!("{}", stream.push(id).unwrap_or_default());
        }
        ControlFlow::Continue(())
    })?;
    println!("{}", stream.flush());
    Ok(())
}
