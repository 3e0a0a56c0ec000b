package org.fleetune.demo;

import android.app.Notification;
import android.app.PendingIntent;
import android.app.Service;
import android.content.Context;
import android.content.Intent;
import android.os.IBinder;
import android.os.PowerManager;
import android.webkit.WebView;

/** Keeps the app alive while it trains; with no page on the screen, it has one of its own that resumes. */
public final class TrainingService extends Service {
    private static final int NOTIFICATION = 1;
    private static final String WITH_PAGE = "page";
    private static final long AWAKE_MS = 6 * 60 * 60 * 1000L;

    private PowerManager.WakeLock awake;
    private WebView view;

    /** Start, or go on; {@code hasOwnPage} where nothing is on the screen. */
    static void start(Context context, boolean hasOwnPage) {
        Newer.startForegroundService(context, intent(context).putExtra(WITH_PAGE, hasOwnPage));
    }

    /** Stop; the page's own files hold what is not sent yet. */
    static void stop(Context context) {
        context.stopService(intent(context));
    }

    @Override
    public int onStartCommand(Intent asked, int flags, int id) {
        boolean hasOwnPage = asked != null && asked.getBooleanExtra(WITH_PAGE, false);
        startForeground(NOTIFICATION, notification(hasOwnPage ? R.string.charging : R.string.training));
        if (awake == null) {
            PowerManager power = (PowerManager) getSystemService(POWER_SERVICE);
            awake = power.newWakeLock(PowerManager.PARTIAL_WAKE_LOCK, "fleetune:training");
            awake.acquire(AWAKE_MS);
        }
        if (hasOwnPage && view == null) {
            view = Page.open(this, "#resume");
        }
        return START_NOT_STICKY;
    }

    @Override
    public void onDestroy() {
        if (view != null) {
            view.destroy();
        }
        if (awake != null && awake.isHeld()) {
            awake.release();
        }
        super.onDestroy();
    }

    @Override
    public IBinder onBind(Intent asked) {
        return null;
    }

    private Notification notification(int text) {
        Intent shown = new Intent(this, MainActivity.class);
        return Newer.notification(this, getString(R.string.channel))
                .setSmallIcon(R.drawable.icon)
                .setContentTitle(getString(R.string.app_name))
                .setContentText(getString(text))
                .setContentIntent(PendingIntent.getActivity(this, 0, shown, PendingIntent.FLAG_IMMUTABLE))
                .setOngoing(true)
                .build();
    }

    private static Intent intent(Context context) {
        return new Intent(context, TrainingService.class);
    }
}
