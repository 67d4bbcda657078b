//! Nothing of its own: the tests run the files of `poll-engine` that hand things over between threads, and an outline
//! of how queues go to sleep, through every order of events that the memory model allows (loom).
