pub fn trials(_: &Option<String>) -> Vec<libtest_mimic::Trial> {
    vec![]
}
