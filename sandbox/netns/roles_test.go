package netns_test

func playRole() {}
