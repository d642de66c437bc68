package replica

import (
	"log/slog"
	"testing"

	"k8s.io/client-go/rest"
)

// Whoever floods one port does not use up what the others may ask of the API server.
func TestClients(t *testing.T) {
	c, err := clientsFor(&rest.Config{Host: "https://api.example"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	watch, review, admit := c.watch.CoreV1().RESTClient().GetRateLimiter(), c.review.CoreV1().RESTClient().GetRateLimiter(), c.admit.CoreV1().RESTClient().GetRateLimiter()
	for range 2 * reviewRate {
		if !review.TryAccept() {
			t.Fatal("TokenReviews are bounded below their rate")
		}
	}
	if !watch.TryAccept() || !admit.TryAccept() {
		t.Error("TokenReviews use up what others may ask")
	}
}
