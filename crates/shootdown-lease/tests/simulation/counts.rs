//! What runs contained.

use std::ops::AddAssign;

macro_rules! counts {
    ($($name:ident: $text:literal, at least $least:literal;)*) => {
        /// What happened in a run, or in many.
        #[derive(Clone, Debug, Default)]
        pub struct Counts { $(pub $name: u64),* }

        impl AddAssign<&Self> for Counts {
            fn add_assign(&mut self, other: &Self) {
                $(self.$name += other.$name;)*
            }
        }

        impl Counts {
            pub fn table(&self) -> String {
                let mut table = String::new();
                $(table += &format!("{:>12}  {}\n", self.$name, $text);)*
                table
            }

            /// What happened too seldom in so many runs to say anything.
            pub fn too_few(&self, runs: u64) -> Vec<&'static str> {
                let mut few = Vec::new();
                // `least` is for 100 runs.
                $(if self.$name * 100 < $least * runs { few.push($text); })*
                few
            }
        }
    };
}

counts! {
    messages: "messages", at least 50_000;
    lost: "messages lost", at least 3_000;
    doubled: "messages that came twice", at least 3_000;
    slow: "messages delayed for longer than a term", at least 1_000;
    cut: "messages cut off by a partition or a link that was down", at least 1_000;
    pauses: "pauses of mirrors", at least 100;
    owner_pauses: "pauses of owners", at least 100;
    crashes: "crashes of mirrors", at least 50;
    owner_crashes: "crashes of owners", at least 40;
    second_starts: "second starts beside a life that went on", at least 50;
    takeovers: "fail-overs while the old owner lives", at least 30;
    deposed: "old owners that saw they were deposed", at least 15;
    refused_writes: "writes of a deposed owner refused", at least 2;
    partitions: "partitions both ways", at least 30;
    one_way: "partitions one way", at least 60;
    links: "links that went down", at least 50;
    invalidations: "invalidations", at least 2_000;
    done: "invalidations done", at least 2_000;
    waited: "of them, those that waited for somebody", at least 1_000;
    at_once: "most invalidations at once, summed over runs", at least 200;
    acknowledged: "endings by acknowledgement", at least 2_000;
    left: "endings by leaving", at least 200;
    joined_anew: "endings by joining anew", at least 5;
    expired: "endings by time", at least 200;
    fences: "fences carried out", at least 50;
    joins: "epochs entered", at least 500;
    fetches: "fetches installed", at least 5_000;
    collided: "fetches that collided", at least 200;
    dropped: "contents dropped by the check at install", at least 100;
    accepted: "reads accepted", at least 20_000;
    rejected: "reads rejected after the use", at least 500;
    current: "accesses by devices, current", at least 10_000;
    refused: "accesses by devices, refused by a fence", at least 200;
}
