package org.fleetune.demo;

import android.content.Context;
import android.webkit.JavascriptInterface;

/** What the page may ask of the phone, as {@code window.fleetuneApp}: nothing that reads. */
final class Bridge {
    private final Context context;

    Bridge(Context context) {
        this.context = context.getApplicationContext();
    }

    /** Keep the app alive, with a notification, from the first step to the last. */
    @JavascriptInterface
    public void training(boolean isOn) {
        if (isOn) {
            TrainingService.start(context, false);
        } else {
            TrainingService.stop(context);
        }
    }

    /** Go on by itself whenever the phone charges and its network has no meter, until told otherwise. */
    @JavascriptInterface
    public void whenCharging(boolean isOn) {
        if (isOn) {
            ChargingJob.plan(context);
        } else {
            ChargingJob.cancel(context);
        }
    }

    /** Whether that was asked for. */
    @JavascriptInterface
    public boolean isWhenCharging() {
        return ChargingJob.isPlanned(context);
    }
}
