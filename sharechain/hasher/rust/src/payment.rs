//! From weights to a coinbase: the draw, what the finder gets, the bytes.
//!
//! `sharechain/payout.py` and `sharechain/coinbase.py` say what belongs into them and why.
#![forbid(unsafe_code)]

use crate::draw::{Terms, draw};
use crate::weights::WeightTable;

/// What a coinbase has besides payouts.
pub struct Frame<'a> {
    pub coinbase_script: &'a [u8],
    pub finder_script: &'a [u8],
    pub witness_commitment: Option<&'a [u8; 32]>,
    pub commitment: &'a [u8; 32],
}

pub struct Payment {
    /// The window's payouts as transaction outputs, and their number.
    pub outputs: Vec<u8>,
    pub count: usize,
    /// What is left for the finder, sat.
    pub finder_amount: u64,
    pub threshold: u64,
    /// The transaction without witness.
    pub coinbase: Vec<u8>,
}

/// Shares `terms.value` among the window and gives the finder `bonus` and what the draw left.
pub fn pay(
    table: &WeightTable,
    terms: &Terms,
    bonus: u64,
    seed: &[u8],
    frame: &Frame<'_>,
) -> Payment {
    let drawn = draw(table, terms, seed).unwrap_or_default();
    let mut payment = Payment {
        finder_amount: bonus + (terms.value - drawn.paid),
        outputs: drawn.outputs,
        count: drawn.count,
        threshold: drawn.threshold,
        coinbase: Vec::new(),
    };
    // Would be dust: joins the first payout.
    if payment.count > 0
        && payment.finder_amount < terms.dust
        && let Some(first) = payment.outputs.first_chunk_mut::<8>()
    {
        *first = (u64::from_le_bytes(*first) + payment.finder_amount).to_le_bytes();
        payment.finder_amount = 0;
    }
    payment.coinbase = build(&payment, frame);
    payment
}

fn build(payment: &Payment, frame: &Frame<'_>) -> Vec<u8> {
    let mut coinbase = Vec::with_capacity(payment.outputs.len() + 400);
    coinbase.extend(2u32.to_le_bytes());
    coinbase.push(1);
    coinbase.extend([0; 32]);
    coinbase.extend([0xff; 4]);
    coinbase.push(frame.coinbase_script.len() as u8);
    coinbase.extend(frame.coinbase_script);
    coinbase.extend([0xff; 4]);
    let pays_finder = payment.finder_amount > 0 || payment.count == 0;
    let count = payment.count + pays_finder as usize + frame.witness_commitment.iter().count() + 1;
    match count {
        0..0xfd => coinbase.push(count as u8),
        0xfd..0x1_0000 => {
            coinbase.push(0xfd);
            coinbase.extend((count as u16).to_le_bytes());
        }
        _ => {
            coinbase.push(0xfe);
            coinbase.extend((count as u32).to_le_bytes());
        }
    }
    coinbase.extend(&payment.outputs);
    let mut output = |amount: u64, opening: &[u8], rest: &[u8]| {
        coinbase.extend(amount.to_le_bytes());
        coinbase.push((opening.len() + rest.len()) as u8);
        coinbase.extend(opening);
        coinbase.extend(rest);
    };
    if pays_finder {
        output(payment.finder_amount, &[], frame.finder_script);
    }
    if let Some(commitment) = frame.witness_commitment {
        output(0, &[0x6a, 0x24, 0xaa, 0x21, 0xa9, 0xed], commitment);
    }
    output(0, &[0x6a, 0x20], frame.commitment);
    coinbase.extend([0; 4]);
    coinbase
}
